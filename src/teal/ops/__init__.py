"""The operations sparsity needs: their definition, their kernels and the one public op for each."""
