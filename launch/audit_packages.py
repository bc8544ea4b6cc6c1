"""Known weaknesses of the installed packages that this project needs, by the database of osv.dev.

    python launch/audit_packages.py        # exit code 1 when there is one; 0 when the database cannot be reached

One request with names and versions; nothing else leaves the machine.
"""

from dataclasses import dataclass

import click

from data.errors import UserError
from data.options import option
from launch.options import command
from trainer.record.packages import PROJECT, needed, weaknesses


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Whom to ask."""

    url: str = option("https://api.osv.dev/v1/querybatch", "Where the database answers batches of queries.")


@command(AuditConfig)
def main(config: AuditConfig) -> None:
    """Ask which versions of the installed packages have known weaknesses."""
    versions = needed()
    click.echo(f"{len(versions)} packages are installed for {PROJECT}")
    try:
        found = weaknesses(versions, config.url)
    except UserError as error:
        click.echo(f"nothing was checked: {error}")
        return
    for name, ids in found.items():
        click.echo(f"{name} {versions[name]}: {', '.join(ids)}")
    if found:
        click.echo(f"{len(found)} packages have known weaknesses; read about one at https://osv.dev/vulnerability/ID")
        raise SystemExit(1)
    click.echo("none has a known weakness")


if __name__ == "__main__":
    main()
