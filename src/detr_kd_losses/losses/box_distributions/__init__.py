"""Distillation of box distributions: `bins` says where bins lie, `loss` compares what is in them."""
