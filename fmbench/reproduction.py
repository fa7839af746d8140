"""Renders results/reproduction.md: what the reference systems published, beside what their entries gave here.

The tables of docs/audit.md, of public claims and of doubtful labels, are written with it.

python -m fmbench.reproduction            write it
python -m fmbench.reproduction --check    fail if it is not what the records say
python -m fmbench.reproduction --controls=keras,torch
                                          first train the references' own nets in their own frameworks

A control has the net, data, split, epochs and batches of our entry, and all else as its framework does it; what
it finds is a record in <results_dir>/controls. What has its record is not trained again, so a call that was
stopped goes on with the run that it was in. All of them take a day on two cores; the cheapest come first.
Frameworks live in environments of their own, which benchmarks/setup_peers.sh makes.

Exit codes: 0 done, 1 --check found a difference, 2 something given cannot be used, 130 interrupted.
"""

from fmbench.pages import generated, reproduction
from fmbench.system import command_line


@command_line.plain_errors("reproduction", "interrupted; the same command goes on from there.")
def main() -> None:
    parser = command_line.Parser("reproduction", description=__doc__)
    generated.add_flags(parser)
    parser.add_argument("--controls", type=_names, default=(), help="frameworks to train in: keras, torch")
    parser.add_argument("--entries", type=_names, default=(), help="only controls of these, as baseline,fc-a")
    parser.add_argument("--num_seeds", type=int, default=3, help="of each control, from 0 (default: 3)")
    arguments = parser.parse_args()
    if arguments.controls:
        from fmbench.studies import controls

        controls.train(arguments.controls, arguments.entries, arguments.num_seeds, arguments.results_dir)
    generated.write_or_check("reproduction", reproduction.files, arguments.results_dir, check=arguments.check)


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


if __name__ == "__main__":
    main()
