"""python processes.py N PORT SCRIPT [ARGUMENT ...]: starts a script in N processes as the deepspeed launcher does, without
the eight seconds that the launcher takes to import what it does not need. When one fails, the others are ended."""

import os
import subprocess
import sys
import time


def main():
    number, port, *command = sys.argv[1:]
    world = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    for rank in range(int(number)):
        environment = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        script, *arguments = command
        running.append(subprocess.Popen([sys.executable, script, f"--local_rank={rank}", *arguments], env=environment))
    try:
        while any(each.poll() is None for each in running) and not any(each.poll() for each in running):
            time.sleep(0.1)
    finally:
        for each in running:
            if each.poll() is None:
                each.kill()
        codes = [each.wait() for each in running]
    return next((abs(code) for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
