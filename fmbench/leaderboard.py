"""Renders the records: results/leaderboard.md and .csv, and index.html, a page for a browser.

python -m fmbench.leaderboard            write them
python -m fmbench.leaderboard --check    fail if they, or an accuracy, are not what the records say
python -m fmbench.leaderboard --serve    show index.html as it is, on loopback only, until Ctrl-C
"""

from pathlib import Path

from fmbench.board import page, server
from fmbench.pages import generated, leaderboard
from fmbench.records import store
from fmbench.system import command_line

PORT = 8008


@command_line.plain_errors("leaderboard")
def main() -> None:
    parser = command_line.Parser("leaderboard", description=__doc__)
    generated.add_flags(parser)
    parser.add_argument(
        "--serve", action="store_true", help="write nothing; serve index.html to this machine's browsers"
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"of --serve; 0 for any that is free (default: {PORT})"
    )
    arguments = parser.parse_args()
    if arguments.serve and arguments.check:
        parser.error("--serve and --check are two things; give one")
    if arguments.port != PORT and not arguments.serve:
        parser.error("--port is of --serve, which is not given")
    if not arguments.serve:
        generated.write_or_check("leaderboard", _files, arguments.results_dir, check=arguments.check)
        return
    with server.Server(arguments.results_dir / "index.html", arguments.port) as serving:
        print(f"{serving.url} shows {serving.page}; Ctrl-C ends it.", flush=True)
        serving.serve_forever()


def _files(results_dir: Path) -> dict[Path, str]:
    records = store.read_all(results_dir)
    leaderboard.verify_accuracies(records)
    tables = leaderboard.rows_by_condition(records)
    return leaderboard.render(results_dir, records, tables) | page.files(results_dir, tables)


if __name__ == "__main__":
    main()
