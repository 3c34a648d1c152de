"""What is predicted before anything is trained or measured: parameters, memory, time and cost."""
