"""Real programs on every level of isolation: a Debian with a shell, python, git, a compiler, and three servers."""

from __future__ import annotations

import hashlib
import http.client
import os
import subprocess
from pathlib import Path

import pytest
from daemon import Daemon, eventually
from test_levels import Level, every_hierarchy, level  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.levels, pytest.mark.leaves("links", "netns"), pytest.mark.timeout(600)]

INCLUDE = "python3,python3-pip,git,gcc,libc6-dev,nginx-light,postgresql,redis-server,ca-certificates"
CACHE = Path(os.environ.get("DOLIUM_LEVELS_CACHE", Path.home() / ".cache" / "dolium-levels"))


def root_tar() -> Path:
    """A Debian root file system, made once and kept."""
    path = CACHE / f"bookworm-{len(INCLUDE)}.tar"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new.tar")
        done = subprocess.run(["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={INCLUDE}", "--quiet", "bookworm",
                               str(beside)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        beside.rename(path)
    return path


@pytest.fixture(scope="module")
def engine(every_hierarchy: None, engine: Daemon) -> Daemon:  # noqa: F811
    """With that Debian."""
    engine.docker("import", str(root_tar()), "debian:1", timeout=240)
    return engine


def sh(level: Level, script: str, *flags: str) -> str:  # noqa: F811
    """What a script prints, its words' last line aside from noise: it must end well."""
    done = level.run("--rm", *flags, "debian:1", "sh", "-euc", script, check=False, timeout=240)
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return done.stdout


def test_shell_and_coreutils(level: Level) -> None:  # noqa: F811
    out = sh(level, """
        mkdir -p /w/a/b; cd /w
        seq 1000 | tee a/n | sort -rn | head -n 3
        for i in $(seq 200); do echo $i > a/b/$i; done
        find . -type f | wc -l; du -s --apparent-size a/n | cut -f 1; tar c a | tar t | wc -l
        ln -s a/n link; ln a/n hard; find a/n -printf '%n\\n'; readlink -f link; cksum < hard; rm -r a; ls
        (exit 3) || echo code $?; echo pipe | { read x; echo $x; }; date -u -d @0 +%Y; env -i /usr/bin/env | wc -l
        mkfifo f; (echo through > f &) ; cat f; timeout 1 sleep 5 || echo timed out
    """)
    assert out.split("\n") == ["1000", "999", "998", "201", "4", "203", "2", "/w/a/n", "1830648734 3893", "hard", "link", "code 3",
                               "pipe", "1970", "0", "through", "timed out", ""]


def test_python_and_pip_from_an_index_of_ones_own(level: Level) -> None:  # noqa: F811
    out = sh(level, """
        mkdir -p /src/greet /index/greet; cd /src
        echo 'def hello(): return "hello from a wheel"' > greet/__init__.py
        cat > pack.py <<'P'
import zipfile
with zipfile.ZipFile("/index/greet/greet-1.0-py3-none-any.whl", "w") as z:
    z.write("greet/__init__.py")
    z.writestr("greet-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: greet\\nVersion: 1.0\\n")
    z.writestr("greet-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    z.writestr("greet-1.0.dist-info/RECORD", "")
P
        python3 pack.py
        echo '<a href="greet-1.0-py3-none-any.whl">greet-1.0-py3-none-any.whl</a>' > /index/greet/index.html
        cd /; python3 -m http.server -d /index 8000 > /dev/null 2>&1 &
        for i in $(seq 100); do python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8000), 1)' 2> /dev/null && break; sleep 0.1; done
        pip install -q --break-system-packages --root-user-action ignore --index-url http://127.0.0.1:8000 greet
        python3 -c 'import greet, threading, multiprocessing as m
print(greet.hello())
with m.Pool(2) as p: print(sum(p.map(abs, range(-100, 0))))'
    """)
    assert out == "hello from a wheel\n5050\n"


def test_git(level: Level) -> None:  # noqa: F811
    out = sh(level, """
        export HOME=/root; git config --global user.email a@b; git config --global user.name n; git config --global init.defaultBranch main
        git init -q /one; cd /one; for i in $(seq 50); do echo $i > f$i; done; git add .; git commit -qm first
        echo more >> f1; git commit -qam second; git clone -q /one /two; cd /two; git log --format=%s; git fsck 2>&1 | wc -l
        git checkout -qb side HEAD~1; echo side > s; git add s; git commit -qm side; git merge -q main -m merged; git status --short | wc -l; cat f1
    """)
    assert out == "second\nfirst\n0\n0\n1\nmore\n"


def test_a_compiler(level: Level) -> None:  # noqa: F811
    out = sh(level, """
        cd /tmp; cat > a.c <<'C'
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
static _Atomic int sum;
static void *add(void *x) { for (int i = 0; i < 1000; i++) sum++; return x; }
int main(void) {
    pthread_t t[4];
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 4; i++) pthread_create(&t[i], 0, add, 0);
    for (int i = 0; i < 4; i++) pthread_join(t[i], 0);
    sprintf(page, "%d", sum);
    return puts(page) < 0;
}
C
        gcc -O2 -Wall -pthread a.c -o a; ./a; gcc -g -static a.c -o b; ./b
    """)
    assert out == "4000\n4000\n"


def test_nginx(level: Level) -> None:  # noqa: F811
    level.started("-p", "127.0.0.1::80", "debian:1", "nginx", "-g", "daemon off;")
    port = level.inspect()["NetworkSettings"]["Ports"]["80/tcp"][0]["HostPort"]

    def asked(path: str = "/") -> bytes:
        client = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)  # not urllib: that asks for the connection's end, and
        try:  # what nginx has corked (tcp_nopush) when it closes, Debian's runsc does not send
            client.request("GET", path)
            return client.getresponse().read()
        except OSError:
            return b""
        finally:
            client.close()

    assert b"nginx" in eventually(asked, "it answers")
    level.exec("sh", "-c", "head -c 3000000 /dev/urandom > /var/www/html/big; md5sum < /var/www/html/big > /var/www/html/sum")
    assert hashlib.md5(asked("/big")).hexdigest() == asked("/sum").decode().split()[0]
    level.docker("stop", "-t", "20", "box")
    assert level.inspect()["State"]["ExitCode"] == 0


def test_postgresql(level: Level) -> None:  # noqa: F811
    out = sh(level, """
        export PATH=$PATH:$(echo /usr/lib/postgresql/*/bin)
        initdb -D /var/lib/postgresql/d -A trust > /dev/null; cd /var/lib/postgresql
        pg_ctl -D d -o '-k /tmp' -l log -w start > /dev/null || { cat log; exit 1; }
        psql -h /tmp -qAt postgres <<'S'
create table t (n int primary key, v text);
insert into t select i, md5(i::text) from generate_series(1, 5000) i;
begin; update t set v = 'x' where n % 2 = 0; rollback;
select count(*), count(distinct v) from t;
S
        pg_ctl -D d -m immediate stop > /dev/null; pg_ctl -D d -o '-k /tmp' -l log -w start > /dev/null
        psql -h /tmp -qAt postgres -c 'select max(n) from t'; pg_ctl -D d -m fast stop > /dev/null
    """, "-u", "postgres")
    assert out == "5000|5000\n5000\n"


def test_redis(level: Level) -> None:  # noqa: F811
    level.started("debian:1", "redis-server", "--save", "", "--appendonly", "yes", "--dir", "/tmp")
    eventually(lambda: level.exec("redis-cli", "ping", check=False).stdout == "PONG\n", "it answers")
    assert level.exec("redis-cli", "set", "a", "kept").stdout == "OK\n"
    level.exec("redis-benchmark", "-q", "-n", "200", "-c", "4", "-t", "set,get")
    level.docker("restart", "-t", "20", "box")
    eventually(lambda: level.exec("redis-cli", "get", "a", check=False).stdout == "kept\n", "what was set is there again")
