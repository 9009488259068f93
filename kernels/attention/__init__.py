"""Attention: the public function, its Triton kernels, and which implementation is fastest where."""
