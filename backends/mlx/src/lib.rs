//! mesh-backend-mlx
