"""``dolium``: finds the command, finds or starts the daemon, tells errors. Commands are imported when they are called."""

from __future__ import annotations

from dolium.cli.context import Context
from dolium.cli.flags import UsageError
from dolium.cli.transport import ApiError, Client, NoDaemon

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# command: (module, function, what it does)
COMMANDS = {
    "run": ("run", "run", "create a container, start it, stay until it ends"),
    "exec": ("run", "execute", "run one more process in a container"),
    "ps": ("containers", "ps", "list containers"),
    "logs": ("containers", "logs", "print what a container wrote"),
    "attach": ("containers", "attach", "connect to a running container"),
    "stop": ("containers", "stop", "ask containers to end"),
    "kill": ("containers", "kill", "send a signal"),
    "rm": ("containers", "remove", "remove containers"),
    "create": ("run", "create", "create a container"),
    "start": ("containers", "start", "start containers"),
    "restart": ("containers", "restart", "stop and start containers"),
    "wait": ("containers", "wait", "wait for the end of containers"),
    "pause": ("containers", "pause", "freeze containers"),
    "unpause": ("containers", "unpause", "thaw containers"),
    "rename": ("containers", "rename", "give a container another name"),
    "inspect": ("containers", "inspect", "print all that is known, as JSON"),
    "top": ("containers", "top", "list the processes of a container"),
    "stats": ("containers", "stats", "show what containers use"),
    "cp": ("containers", "copy", "copy files out of or into a container"),
    "port": ("ports", "port", "list what a container publishes; port add, port rm"),
    "pull": ("images", "pull", "fetch an image from a registry"),
    "push": ("registries", "push", "send an image to a registry"),
    "login": ("registries", "login", "keep the credentials of a registry"),
    "logout": ("registries", "logout", "forget the credentials of a registry"),
    "images": ("images", "images", "list images"),
    "rmi": ("images", "remove", "remove images"),
    "tag": ("images", "tag", "give an image another name"),
    "load": ("images", "load", "load images from an archive"),
    "import": ("images", "import_", "make an image of a root file system"),
    "history": ("images", "history", "show how an image was made"),
    "save": ("archives", "save", "write images to an archive"),
    "export": ("archives", "export", "write a container's root file system as a tar"),
    "commit": ("archives", "commit", "make an image of what a container has changed"),
    "diff": ("archives", "diff", "list what a container has changed"),
    "mirror": ("mirror", "mirror", "serve as a registry what others have, and keep it"),
    "image": ("groups", "image", "commands on images, and image prune"),
    "artifact": ("groups", "artifact", "commands on artifacts: what registries keep beside images"),
    "lease": ("groups", "lease", "what keeps blobs that no image names"),
    "manifest": ("groups", "manifest", "what a registry says of an image"),
    "network": ("groups", "network", "networks of your own, and who is in them"),
    "volume": ("groups", "volume", "folders that outlive containers"),
    "system": ("groups", "system", "system df, prune, check and more"),
    "events": ("system", "events", "print what happens"),
    "info": ("system", "info", "facts about the daemon and this machine"),
    "version": ("system", "version", "versions"),
    "daemon": ("system", "daemon", "start or stop the daemon"),
}
NO_DAEMON_NEEDED = ("daemon", "version", "logout", "mirror")


def usage() -> str:
    """The help of the program itself."""
    lines = ["usage: dolium COMMAND [flags] [arguments]", "",
             "Containers: one engine, every isolation level, and it shows what each costs.", "",
             "A first one that needs no image:",
             "  dolium run --rm --rootfs /:O sh -c 'echo I am pid $$ on $(hostname)'", "",
             "commands:", *(f"  {name:<10}{about}" for name, (_, _, about) in COMMANDS.items()), "",
             "`dolium COMMAND --help` shows a command's flags. The docker command line works too:",
             "  DOCKER_HOST=unix:///run/dolium/dolium.sock docker ps"]
    return "\n".join(lines) + "\n"


def _load(name: str) -> Callable[[Client, Context, list[str]], int]:
    module, function, _ = COMMANDS[name]
    package = __import__(f"dolium.cli.{module}", fromlist=[function])
    command: Callable[[Client, Context, list[str]], int] = getattr(package, function)
    return command


def run(context: Context, client: Client) -> int:
    """One call; returns the exit code."""
    words = context.argv[1:]
    if not words or words[0] in ("-h", "--help", "help"):
        if len(words) > 1 and words[0] == "help" and words[1] in COMMANDS:
            words = [words[1], "--help"]
        else:
            context.stdout.write(usage())
            return 0
    if words[0] in ("-v", "--version"):
        words = ["version"]
    name = words[0]
    if name not in COMMANDS:
        context.complain(f"{name!r} is not a command: `dolium --help` lists them")
        return 125
    command = _load(name)
    try:
        try:
            return command(client, context, words[1:])
        except NoDaemon:
            if name in NO_DAEMON_NEEDED or not context.starts_daemon:
                raise
            from dolium.cli.system import start_daemon

            start_daemon(context, [])
            return command(client, context, words[1:])
    except UsageError as error:
        context.complain(f"{error}\n`dolium {name} --help` shows how")
        return 125
    except NoDaemon:
        context.complain(f"no daemon answers at {context.socket}: is it running? (`dolium daemon start`)")
    except ApiError as error:
        context.complain(str(error))
    except PermissionError as error:
        context.complain(f"{error.filename or context.socket}: permission denied: are you root, or in the group docker?")
    except FileExistsError as error:
        context.complain(f"{error.filename}: exists already")
    except BrokenPipeError:
        return 141  # whoever read the output has gone, as a shell reports SIGPIPE
    except KeyboardInterrupt:
        return 130
    return 125 if name == "run" else 1


def entry() -> int:
    """The program."""
    context = Context.of_process()
    code = run(context, Client(context.socket))
    try:
        context.stdout.flush()
    except BrokenPipeError:
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    return code
