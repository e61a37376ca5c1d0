"""`python -m hf_linattn` and `accelerate launch -m hf_linattn`: the command line."""

from hf_linattn.cli import main

if __name__ == "__main__":
    main()
