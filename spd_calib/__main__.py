"""`python -m spd_calib`, and under torchrun on many ranks: `torchrun --nproc-per-node N -m spd_calib ...`."""

from spd_calib.cli.main import main

if __name__ == "__main__":
    main()
