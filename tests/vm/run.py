"""Tests on a kernel of their own: QEMU boots Debian's cloud kernel with cgroup v2 only, systemd starts pytest.

    python tests/vm/run.py [--deadline SECONDS] [pytest's words ...]      without words: what tests/vm/tests.txt lists

Three parts go in. The root file system (`packages.txt`, the kernel's modules, Python's packages) is made once with
mmdebstrap and kept, under a hash of what it is made of; the machine writes to a throw-away copy of it (QEMU's
``snapshot``). The checkout travels as a tar on a second disk, so a change of code builds nothing. A small initramfs has the
virtio modules and the unit. What the machine says comes over the serial line, and the last line is pytest's exit code
behind a word that is new for each boot. No KVM: the machines that test dolium cannot run a guest in it.

Exit code: pytest's; 124 at the deadline; 125 when the machine ended without a result or could not be made.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import inspect
import io
import mmap
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
PACKAGES = HERE / "packages.txt"
SUITE, PYTHON = "bookworm", "3.11"
WHEELS = ("pytest>=8", "pytest-timeout>=2.2", "hypothesis>=6.90", "aiohttp>=3.9", "isal>=1.5", "zstandard>=0.22",
          "cryptography>=38")
MIRRORS = (f"deb http://deb.debian.org/debian {SUITE} main", f"deb http://deb.debian.org/debian-security {SUITE}-security main")
TREE = "srv/dolium"  # the checkout in the machine
SITE = f"usr/lib/dolium-test/python{PYTHON}"  # Python's packages in the machine
MODULES = ("virtio_ring", "virtio", "virtio_mmio", "virtio_blk")  # in the order in which they need each other
MEMORY, DISK = "2G", "3G"
NOT_RUN, TOO_LATE = 125, 124
BUILD_DEADLINE = 600.0

INIT = """#!/bin/busybox sh
set -e
b=/bin/busybox
$b mkdir -p /proc /sys /dev /root
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
for module in %(modules)s; do $b insmod /$module.ko; done
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do [ -b /dev/vdb ] && break; $b sleep 0.1; done
$b mount -t ext4 /dev/vda /root
$b mkdir -p /root/%(tree)s
$b tar -x -f /dev/vdb -C /root/%(tree)s
$b cp /dolium-test.service /root/etc/systemd/system/
$b umount /sys /proc
exec $b switch_root /root /sbin/init
"""

UNIT = """[Unit]
Description=dolium's tests
DefaultDependencies=no
Requires=sysinit.target dbus.socket
After=basic.target sysinit.target dbus.socket
FailureAction=poweroff-immediate
SuccessAction=poweroff-immediate

[Service]
Type=oneshot
Delegate=yes
WorkingDirectory=/%(tree)s
Environment=CI=true HOME=/root LANG=C.UTF-8 PATH=/%(tree)s/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin DOLIUM_TEST_VM=1
StandardInput=null
StandardOutput=tty
StandardError=tty
TTYPath=/dev/ttyS0
LimitNOFILE=20000
TimeoutStartSec=infinity
ExecStart=/bin/sh /%(tree)s/vm-tests
"""

# pytest's exit code on a line of its own behind the word; on failure the kernel's last words before it
TESTS = """stty -F /dev/ttyS0 -onlcr
/%(tree)s/.venv/bin/python3 -m pytest --color=no %(words)s
code=$?
[ $code = 0 ] || { echo '--- the kernel:'; dmesg | tail -n 30; }
echo
echo "%(word)s $code"
sync -f /dev/ttyS0 2> /dev/null || true
exit $code
"""


class Unable(Exception):
    """The machine cannot be made; the text says why."""


def call(*words: str, deadline: float, **options: str) -> str:
    """Standard output of a command. Raises Unable with its last words."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=deadline,
                              cwd=options.get("cwd"))
    except FileNotFoundError:
        raise Unable(f"{words[0]} is not installed: `make test-packages`") from None
    except subprocess.TimeoutExpired:
        raise Unable(f"{words[0]} did not end within {deadline:g} s") from None
    if done.returncode != 0:
        raise Unable(f"{shlex.join(words)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def tsc_khz() -> int:
    """The rate of the time stamp counter, which the guest sees as it is; measured, over 50 ms.

    The guest's own calibration counts emulated timers and sometimes never ends (13 of 59 boots hung). /proc/cpuinfo tells
    the core's present clock, which is another thing where it changes.
    """
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("0f31" "48c1e220" "4809d0" "c3"))  # rdtsc; shl rdx,32; or rax,rdx; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(address)
    begin, first = time.monotonic_ns(), int(read())
    time.sleep(0.05)  # not a poll: the time that is measured
    return round((int(read()) - first) * 1_000_000 / (time.monotonic_ns() - begin))


def cache() -> Path:
    """Where root file systems are kept: $DOLIUM_VM_CACHE, or ~/.cache/dolium-vm."""
    return Path(os.environ.get("DOLIUM_VM_CACHE") or Path.home() / ".cache/dolium-vm")


def prepared() -> Path:
    """A folder with ``root.ext4``, ``vmlinuz`` and the modules of the initramfs, made when it is not there. Raises Unable."""
    names = [line for line in PACKAGES.read_text().split("\n") if line and not line.startswith("#")]
    recipe = repr((names, SUITE, WHEELS, MIRRORS, SITE, MODULES, DISK, inspect.getsource(_make)))
    place = cache() / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if place.is_dir():
        return place
    if os.geteuid() != 0:
        raise Unable("needs root, to make a Debian root file system")
    print(f"making the machine's root file system in {place}", flush=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        _make(Path(scratch), names)
        try:
            os.rename(Path(scratch) / "done", place)
        except OSError:  # another run was faster
            if not place.is_dir():
                raise
    for old in place.parent.iterdir():  # one is kept
        if old != place and re.fullmatch("[0-9a-f]{16}", old.name):
            shutil.rmtree(old)
    return place


def _make(scratch: Path, names: list[str]) -> None:
    root, done = scratch / "root", scratch / "done"
    done.mkdir()
    # The kernel is unpacked, not installed: its package would make an initramfs of its own. /lib is a link, which must stay.
    kernel = ("cd /var/cache/apt/archives && apt-get -qq download $(apt-cache depends linux-image-cloud-amd64 | "
              "sed -n 's/.*Depends: \\(linux-image-.*\\)/\\1/p') && dpkg-deb --fsys-tarfile linux-image-*.deb | "
              "tar -x --keep-directory-symlink -C / && rm linux-image-*.deb && depmod $(ls /lib/modules)")
    call("mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(names)}", "--quiet",
         '--aptopt=Acquire::Languages "none"', "--dpkgopt=path-exclude=/usr/share/man/*",
         "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
         f"--customize-hook=chroot \"$1\" sh -c {shlex.quote(kernel)}", SUITE, str(root), *MIRRORS, deadline=BUILD_DEADLINE)
    call(sys.executable, "-m", "pip", "install", "-q", "--target", str(root / SITE), "--python-version", PYTHON,
         "--implementation", "cp", "--only-binary=:all:", *WHEELS, deadline=BUILD_DEADLINE)
    (root / SITE / "dolium.pth").write_text(f"/{TREE}/src\n")
    call("chroot", str(root), "python3", "-m", "compileall", "-q", f"/{SITE}", deadline=BUILD_DEADLINE)
    (root / "etc/hostname").write_text("dolium-vm\n")
    (root / "etc/machine-id").write_text("0" * 31 + "1\n")
    for unneeded in ("systemd-networkd", "apt-daily.timer", "e2scrub_all.timer", "fstrim.timer"):
        (root / f"etc/systemd/system/{unneeded}").unlink(missing_ok=True)
    for module in MODULES:
        shutil.copy(next((root / "lib/modules").rglob(f"{module}.ko")), done)
    shutil.copy(next((root / "boot").glob("vmlinuz-*")), done / "vmlinuz")
    shutil.rmtree(root / "boot")
    call("mkfs.ext4", "-q", "-d", str(root), "-E", "root_owner=0:0", "-O", "verity", str(done / "root.ext4"), DISK,
         deadline=BUILD_DEADLINE)
    shutil.rmtree(root)


def checkout(path: Path, tests: str) -> None:
    """A tar of what the tests need, and a virtual environment beside it: names that lead to the machine's own Python."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        def keep(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
            return None if member.name.endswith(("__pycache__", ".pyc")) else member

        def text(name: str, content: str) -> None:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content.encode()), 0o644
            archive.addfile(member, io.BytesIO(content.encode()))

        def link(name: str, target: str) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)

        for name in ("src", "tests", "native", "packaging", "pyproject.toml"):
            archive.add(CHECKOUT / name, name, filter=keep)
        text("vm-tests", tests)
        text(".venv/pyvenv.cfg", "home = /usr/bin\ninclude-system-site-packages = false\n")
        link(f".venv/lib/python{PYTHON}/site-packages", f"/{SITE}")
        for name in ("python", "python3"):
            link(f".venv/bin/{name}", "/usr/bin/python3")
        for name in ("dolium", "dolium-runtime"):
            link(f".venv/bin/{name}", "../../src/dolium/_native/dolium-front")
    with open(path, "ab") as file:
        file.truncate((file.tell() + 0xFFFF) & ~0xFFFF)  # a disk has whole sectors


def initramfs(place: Path, scratch: Path) -> Path:
    """busybox, the virtio modules, the unit."""
    tree = scratch / "initramfs"
    (tree / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin")
    for module in MODULES:
        shutil.copy(place / f"{module}.ko", tree)
    (tree / "init").write_text(INIT % {"modules": " ".join(MODULES), "tree": TREE})
    (tree / "init").chmod(0o755)
    (tree / "dolium-test.service").write_text(UNIT % {"tree": TREE})
    packed = scratch / "initramfs.cpio"
    call("sh", "-c", f"find . | busybox cpio -o -H newc > {shlex.quote(str(packed))}", cwd=str(tree), deadline=60)
    return packed


def boot(place: Path, scratch: Path, word: str, deadline: float) -> int:
    """Run the machine, copy what it says, return the code behind the word. The machine has ended when this returns."""
    command_line = ("console=ttyS0 quiet loglevel=3 panic=-1 cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1 "
                    f"systemd.show_status=false systemd.mask=systemd-udev-trigger.service "
                    f"systemd.unit=dolium-test.service tsc_early_khz={tsc_khz()} mitigations=off")
    machine = ["qemu-system-x86_64", "-M", "microvm,acpi=on,rtc=on", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2",
               "-m", MEMORY, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
               "-kernel", str(place / "vmlinuz"), "-initrd", str(initramfs(place, scratch)), "-append", command_line,
               "-drive", f"id=root,file={place}/root.ext4,format=raw,if=none,snapshot=on",
               "-device", "virtio-blk-device,drive=root",
               "-drive", f"id=tree,file={scratch}/tree.tar,format=raw,if=none,readonly=on",
               "-device", "virtio-blk-device,drive=tree"]
    end, code, rest = time.monotonic() + deadline, None, b""
    try:
        qemu = subprocess.Popen(machine, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(scratch)})
    except FileNotFoundError:
        raise Unable("qemu-system-x86_64 is not installed: `make test-packages`") from None
    try:
        assert qemu.stdout is not None
        fd = qemu.stdout.fileno()
        while code is None and (left := end - time.monotonic()) > 0:
            if not select.select([fd], [], [], left)[0]:
                break
            chunk = os.read(fd, 65536)
            if not chunk:
                break
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            rest = (rest + chunk)[-4096:]
            found = re.search(rf"^{word} (\d+)\r?$".encode(), rest, re.MULTILINE)
            code = int(found[1]) if found and rest.find(b"\n", found.end()) >= 0 else None
        if code is None:
            late = time.monotonic() >= end
            print(f"\nthe machine {f'did not end within {deadline:g} s' if late else 'ended without a result'}", flush=True)
            return TOO_LATE if late else NOT_RUN
        return code
    finally:
        qemu.kill()
        qemu.wait()


def main() -> int:
    """Make what is missing, boot, test."""
    options = argparse.ArgumentParser(description="run tests in a virtual machine with cgroup v2 only")
    options.add_argument("--deadline", type=float, default=1100.0,
                         help="seconds for all of it, making the machine too (%(default)g)")
    given, words = options.parse_known_args()  # the rest is pytest's
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # the machine ends with us
    words = words or [line for line in (HERE / "tests.txt").read_text().split("\n") if line and not line.startswith("#")]
    word = f"dolium-vm-{secrets.token_hex(8)}"
    begin = time.monotonic()
    try:
        place = prepared()
        with tempfile.TemporaryDirectory(prefix="dolium-vm-", dir="/var/tmp") as folder:
            scratch = Path(folder)
            checkout(scratch / "tree.tar", TESTS % {"tree": TREE, "word": word, "words": shlex.join(words)})
            made = time.monotonic()
            code = boot(place, scratch, word, given.deadline - (made - begin))
    except Unable as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return NOT_RUN
    now = time.monotonic()
    print(f"virtual machine: made ready in {made - begin:.0f} s, ran {now - made:.0f} s, exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
