//! mesh-backend-llama-server
