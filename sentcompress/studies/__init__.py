"""Many runs compared: sweeps over a grid, and scaling laws."""
