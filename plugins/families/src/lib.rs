//! Model families, one file each: who it is, how it talks, how it computes. What two share lives in `mesh-graph`.

// Every file in this folder is a family; none has to be listed.
automod::dir!("src");
