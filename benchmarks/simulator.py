"""How fast the simulator is, and how that grows with the swarm. One process, one core.

python -m benchmarks.simulator                      # 100 to 3,000 peers, 10 virtual minutes each
python -m benchmarks.simulator --peers 1000         # the size that is promised: 3 minutes, 2 GiB
"""

import argparse
import json
import subprocess
import sys

SIZES = (100, 300, 1_000, 3_000)


def measure(peers: int, duration_s: float) -> dict[str, float]:
    """In a process of its own, so that the memory is its own."""
    command = [sys.executable, "-m", "sim", "run", "scale", "--peers", str(peers), "--duration", str(duration_s)]
    done = subprocess.run([*command, "--json"], stdout=subprocess.PIPE, check=True)
    report: dict[str, float] = json.loads(done.stdout)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=SIZES)
    parser.add_argument("--duration", type=float, default=600.0, help="virtual seconds (default: %(default)s)")
    args = parser.parse_args()
    print(" peers    tokens      events  virtual s   real s    cpu s  peak MiB    p95 s")
    for peers in args.peers:
        report = measure(peers, args.duration)
        print(
            f"{peers:6,}  {report['tokens']:8,}  {report['events']:10,}  {report['virtual_s']:9.0f}  "
            f"{report['real_s']:7.1f}  {report['cpu_s']:7.1f}  {report['peak_mib']:8.0f}  "
            f"{report['token']['p95_s']:7.3f}",  # type: ignore[index]
            flush=True,
        )


if __name__ == "__main__":
    main()
