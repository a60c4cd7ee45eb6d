"""`fedscan agent key`: create, show, rotate, back up and restore the site's key."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_KEY = """\
The site's key makes the pseudonyms and protects the encrypted cache. It never leaves the site. Lost without a backup,
the cache is lost, and the same patients get other pseudonyms the next time.

  fedscan agent key create  /srv/fedscan/site
  fedscan agent key backup  /srv/fedscan/site /media/safe/north-key.txt     now, and after every rotation
  fedscan agent key show    /srv/fedscan/site

Where it is kept: [key] in site.toml, source = "file" (default: SITE_DIR/key, mode 0600), "environment" or "keyring"."""

_CREATE = """\
Draws the key of a new site from the operating system's entropy. A key that is there is never replaced.

With source = "environment" it is written to SITE_DIR/key.environment, as systemd's EnvironmentFile is: move it to where
the variable is set from, and remove it from the site's folder."""

_SHOW = """\
Shows where the key is kept, its public fingerprint, and whether it opens the cache. The first half of the fingerprint
never changes, the second does with every rotation. It is no secret: compare it with the one on a backup."""

_ROTATE = """\
Replaces the half of the key that protects the cache; pseudonyms do not change and images are not written again. Do it
when somebody leaves who could read the key, or when a copy of it may have got away.

  fedscan agent key rotate /srv/fedscan/site --dry-run     opens every patient's key, changes nothing
  fedscan agent key rotate /srv/fedscan/site

Stopped at any moment, everything stays readable, and the same command goes on. The old key, and every backup of it,
then opens nothing that is here: make a new backup, and destroy the old one. Stop the agent first, and `listen`, `pull`
and `ingest`: while one of them works with the key the rotation is refused, and while it is at work they are.

With source = "environment" it takes two runs. After the first one everything is under the new key, which the others use
at once; set the variable to the line in SITE_DIR/key.next, and run it again: that ends it and removes the old key."""

_BACKUP = """\
Writes the key as a page of text that can be printed and typed again, sealed with a passphrase (at least 12 characters;
five or six words at random). Keep the two apart. Without the passphrase nobody opens it, you neither.

  fedscan agent key backup /srv/fedscan/site /media/safe/north-key.txt

The passphrase is asked for twice. For automation: --passphrase-fd 3, or the variable FEDSCAN_KEY_PASSPHRASE."""

_RESTORE = """\
Puts the key of a backup in place. Refused where another key is in place, or where the cache belongs to another one.

  fedscan agent key restore /srv/fedscan/site /media/safe/north-key.txt --check    opens the backup, changes nothing
  fedscan agent key restore /srv/fedscan/site /media/safe/north-key.txt

It brings back the key and nothing else: with it the cache that is there, or a copy of it, can be read again, and the
same patients get the same pseudonyms. A patient who was destroyed stays destroyed, unless the folder keys/ of the cache
is put back too."""


def add(agent: "argparse._SubParsersAction[Any]") -> None:
    """Adds `key` to the commands of `fedscan agent`."""
    plain = argparse.RawDescriptionHelpFormatter
    key = agent.add_parser(
        "key", help="create, back up, rotate the site's key", description=_KEY, formatter_class=plain
    )
    commands = key.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, words: str, text: str, run: Any) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=words, description=text, formatter_class=plain)
        parser.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder")
        parser.set_defaults(command=run)
        return parser

    command("create", "draw the key of a new site", _CREATE, create)
    command("show", "where it is, its fingerprint, what it opens", _SHOW, show).add_argument(
        "--json", action="store_true", help="print JSON on standard output"
    )
    command("rotate", "replace what protects the cache", _ROTATE, rotate).add_argument(
        "--dry-run", action="store_true", help="say what would be done, change nothing"
    )
    backup_parser = command("backup", "write a sealed copy for the safe", _BACKUP, backup)
    backup_parser.add_argument("file", metavar="FILE", type=Path, help="a new file, best on another disk")
    restore_parser = command("restore", "put the key of a backup in place", _RESTORE, restore)
    restore_parser.add_argument("file", metavar="FILE", type=Path, help="the backup")
    restore_parser.add_argument("--check", action="store_true", help="open the backup and compare, change nothing")
    for parser in (backup_parser, restore_parser):
        parser.add_argument(
            "--passphrase-fd", metavar="N", type=int, help="read the passphrase from this file descriptor"
        )


def create(arguments: argparse.Namespace) -> int:
    """`fedscan agent key create SITE_DIR`."""
    from fedscan_client import keys

    site, settings = arguments.site, keys.read_settings(arguments.site)
    key = keys.create(site, settings)
    print(f"The site's key {key.key_id} is in {keys.where(site, settings)}.")
    if settings.source == "environment":
        handed = site / keys.HANDED_OUT
        print(f"It is not there yet: set {settings.variable} from {handed}, then remove that file.")
    print(f"Make a backup now: fedscan agent key backup {site} FILE")
    return 0


def show(arguments: argparse.Namespace) -> int:
    """`fedscan agent key show SITE_DIR`."""
    import json

    from fedscan_client import keys
    from fedscan_client.intake import cache_keys

    site, settings, cache = arguments.site, keys.read_settings(arguments.site), _cache_of(arguments.site)
    key = keys.load(site, settings)
    opened = {} if cache is None else cache_keys.wrapped_by(cache, key)
    told = {
        "key": key.key_id,
        "source": settings.source,
        "place": keys.where(site, settings),
        "patients": len(opened),
        "rotation_unfinished": keys.staged_path(site, settings).exists(),
    }
    if arguments.json:
        print(json.dumps(told, indent=2))
        return 0
    print(f"key        {key.key_id}\nkept in    {told['place']}\nopens      the keys of {len(opened)} cached patients")
    if told["rotation_unfinished"]:
        print(f"rotation   unfinished; to go on: fedscan agent key rotate {site}")
    return 0


def rotate(arguments: argparse.Namespace) -> int:
    """`fedscan agent key rotate SITE_DIR`."""
    from rich.console import Console
    from rich.progress import track

    from fedscan_client import key_rotation, keys
    from fedscan_client.intake import objects

    site, settings = arguments.site, keys.read_settings(arguments.site)
    cache = _cache_of(site, needed=True)
    if arguments.dry_run:
        plan = key_rotation.plan(site, settings, cache)
        begun = "A rotation is unfinished: it would go on. " if plan.unfinished else ""
        print(f"{begun}The keys of {plan.left} of {plan.patients} patients would be wrapped anew. Nothing was changed.")
        return 0

    def progress(names: Sequence[str]) -> Iterable[str]:
        return track(names, "wrapping patients' keys", console=Console(stderr=True), transient=True)

    if key_rotation.rotate(site, settings, cache, also=[objects.rewrapped(site)], progress=progress):
        print(f"The site's key is now {keys.load(site, settings).key_id}; the old one opens nothing here any more.")
        print(f"Make a new backup: fedscan agent key backup {site} FILE")
    else:
        print(
            f"Everything is under the new key. Set {settings.variable} to the line in "
            f"{keys.staged_path(site, settings)}, run this once more, then start what uses it again."
        )
    return 0


def backup(arguments: argparse.Namespace) -> int:
    """`fedscan agent key backup SITE_DIR FILE`."""
    from fedscan_client import key_backup, keys

    key = keys.load(arguments.site, keys.read_settings(arguments.site))
    key_backup.refuse_existing(arguments.file)  # before anything is asked
    key_backup.backup(key, arguments.file, _passphrase(arguments.passphrase_fd, twice=True))
    keys.note(arguments.site, "key backed up", key)
    print(f"The key {key.key_id} is in {arguments.file}, sealed with the passphrase. Try it:")
    print(f"fedscan agent key restore {arguments.site} {arguments.file} --check")
    return 0


def restore(arguments: argparse.Namespace) -> int:
    """`fedscan agent key restore SITE_DIR FILE`."""
    from fedscan_client import key_backup, keys
    from fedscan_client.intake import cache_keys

    site, settings, cache = arguments.site, keys.read_settings(arguments.site), _cache_of(arguments.site)
    passphrase = _passphrase(arguments.passphrase_fd, twice=False)
    if arguments.check:
        key = key_backup.read(arguments.file, passphrase)
        print(f"The backup opens: it holds the key {key.key_id}. Nothing was changed.")
        if cache is not None and cache_keys.is_cache(cache):
            cache_keys.check_key(cache, keys.with_staged(site, settings, key))
            print(f"The cache {cache} belongs to it.")
        else:
            print("There is no cache to compare it with.")
        return 0
    key = key_backup.restore(arguments.file, passphrase, site, settings, cache)
    print(f"The site's key {key.key_id} is in {keys.where(site, settings)}.")
    if settings.source == "environment":
        print(f"It is not there yet: set {settings.variable} from {site / keys.HANDED_OUT}, then remove that file.")
    return 0


def _passphrase(descriptor: int | None, *, twice: bool) -> str:
    """From a file descriptor, FEDSCAN_KEY_PASSPHRASE, or a person at a terminal; one line, without its end."""
    import getpass

    from fedscan_core.errors import ConfigError

    if descriptor is not None:
        try:
            with os.fdopen(descriptor, "r", encoding="utf-8") as file:
                return file.readline().rstrip("\r\n")
        except (OSError, UnicodeDecodeError):
            raise ConfigError(
                f"File descriptor {descriptor} cannot be read.", remedy="For example: --passphrase-fd 3 3< FILE"
            ) from None
    if text := os.environ.get("FEDSCAN_KEY_PASSPHRASE"):
        return text
    if not sys.stdin.isatty():
        raise ConfigError(
            "There is no terminal to ask for the passphrase.",
            remedy="Give --passphrase-fd, or set FEDSCAN_KEY_PASSPHRASE.",
        )
    text = getpass.getpass("Passphrase: ")
    if twice and getpass.getpass("Once more: ") != text:
        raise ConfigError("The two were not the same; nothing was written.", remedy="Try again.")
    return text


def _cache_of(site: Path, *, needed: bool = False) -> Path | None:
    """The cache's folder; None for a site that reads a table. Without site.toml the usual one, unless that is `needed`.

    Raises:
        ConfigError: site.toml cannot be read.
    """
    from fedscan_client import site as sites

    if not needed and not (site / sites.FILE).exists():
        return site / "cache" if (site / "cache").exists() else None
    here = sites.load(site)
    return here.cache if here.table is None else None
