"""The CogVideoX family: what a checkpoint is, its encoders, its forward pass, its adapters."""
