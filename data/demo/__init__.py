"""The open MIMIC demos, cut to what the benchmark needs, and the script that cut them."""
