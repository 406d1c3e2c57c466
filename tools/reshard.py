"""Check a checkpoint, or write it anew for another topology: `python -m tools.reshard runs/demo --out DIR --ranks 4`.

A run needs neither: it checks what it loads, and any topology loads any checkpoint. This is for checkpoints that are to
be moved, shared or kept: in one file with --ranks 1, or in one for every rank, with about what that rank will read. A
run continues from the new folder when it stands in its checkpoints/ under the old one's name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.command_line import OneLineParser
from launch.run_dir import EXIT_COMPLETED, EXIT_REFUSED, checkpoint_name, latest_step
from model.config import CheckpointError
from model.manifest import MANIFEST, Manifest
from model.reshard import reshard, verify


def main(argv: list[str] | None = None) -> int:
    """0 if it is whole, or written; 2, and one line, if not."""
    args = parse_arguments(argv)
    try:
        source = checkpoint_of(args.source)
        if args.out is None:
            print(f"{source}: whole; {describe(verify(source))}")
            return EXIT_COMPLETED
        written = reshard(source, args.out, args.ranks, args.ep_size, args.zero_stage)
        print(f"{args.out}: {describe(written)}; every tensor is that of {source}")
    except (CheckpointError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return EXIT_COMPLETED


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m tools.reshard", description="Check a checkpoint, or write it anew.")
    parser.add_argument("source", type=Path, help="checkpoint folder, or run folder: what its latest names")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the new checkpoint folder; without it only check")
    parser.add_argument("--ranks", type=int, metavar="N", help="files to write")
    parser.add_argument("--ep_size", type=int, default=1, metavar="N", help="ranks that share the experts (default: 1)")
    parser.add_argument("--zero_stage", type=int, choices=(0, 1, 2, 3), help="recorded (default: that of the source)")
    args = parser.parse_args(argv)
    if (args.out is None) != (args.ranks is None):
        parser.error("--out and --ranks go together")
    return args


def checkpoint_of(source: Path) -> Path:
    """The checkpoint folder that is meant by a checkpoint folder or a run folder."""
    if (source / MANIFEST).exists() or not (source / "checkpoints").is_dir():
        return source
    step = latest_step(source)
    if step is None:
        raise CheckpointError(f"{source / 'checkpoints' / 'latest'}: names no checkpoint. Name a checkpoint folder.")
    return source / "checkpoints" / checkpoint_name(step)


def describe(manifest: Manifest) -> str:
    state, size = manifest.state, sum(facts.bytes for facts in manifest.files.values())
    return (
        f"step {state.step}, {len(manifest.tensors)} tensors, {size / 2**20:,.1f} MiB in {len(manifest.files)} files, "
        f"world_size {state.world_size}, ep_size {state.ep_size}, ZeRO {state.zero_stage}"
    )


if __name__ == "__main__":
    sys.exit(main())
