//! Writes shards. Their headers are known before a value is: sizes follow from shapes. So everything is written to its place,
//! in whatever order it comes.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use mesh_graph::{
    Scheme,
    ffi::{self, Packed},
    memory,
};
use mlx_rs::{Array, Dtype, error::Exception};
use serde_json::{Map, Value, json};

use super::{
    ConvertError, Squares, Sums,
    plan::{self, Output, Planned},
    shard_name,
};

/// Headers are filled up to a multiple of so many bytes.
const ALIGNMENT: usize = 8;
/// What MLX may keep of freed buffers, in bytes.
const FREED_BYTES_MAX: u64 = 64 << 20;

/// The files of a conversion, made with room for all that they will hold.
pub(super) struct Files {
    paths: Vec<PathBuf>,
    /// Which file an output lies in, and where.
    places: BTreeMap<String, (usize, u64)>,
    /// What all outputs take, in bytes.
    pub bytes: u64,
}

impl Files {
    /// Makes them in `folder`, one for each shard.
    pub fn create(folder: &Path, shards: &[Vec<Planned>]) -> Result<Self, ConvertError> {
        let mut files = Self { paths: Vec::new(), places: BTreeMap::new(), bytes: 0 };
        for (number, planned) in shards.iter().enumerate() {
            let path = folder.join(shard_name(number, shards.len()));
            let (header, starts, data_bytes) = header(planned);
            let io = ConvertError::io;
            let mut file = File::create_new(&path).map_err(io(&path))?;
            file.write_all(&header).map_err(io(&path))?;
            file.set_len(header.len() as u64 + data_bytes).map_err(io(&path))?;
            let places = starts.into_iter().map(|(name, start)| (name, (number, header.len() as u64 + start)));
            files.places.extend(places);
            files.paths.push(path);
            files.bytes += data_bytes;
        }
        Ok(files)
    }

    /// The file that each output lies in.
    pub fn map(&self) -> BTreeMap<&str, String> {
        let name = |file: usize| shard_name(file, self.paths.len());
        self.places.iter().map(|(output, (file, _))| (output.as_str(), name(*file))).collect()
    }

    fn write(&self, output: &str, offset: u64, bytes: &[u8]) -> Result<(), ConvertError> {
        let Some((file, start)) = self.places.get(output) else {
            return Err(ConvertError::Mlx(format!("`{output}` has no place")));
        };
        let path = &self.paths[*file];
        let write = || -> io::Result<()> {
            // Opened anew each time: a model has more shards than a process may have files.
            let mut file = File::options().write(true).open(path)?;
            file.seek(SeekFrom::Start(start + offset))?;
            file.write_all(bytes)
        };
        write().map_err(ConvertError::io(path))
    }

    /// Has all of it on disk: files are trusted by their directory's name from now on.
    pub fn sync(&self) -> Result<(), ConvertError> {
        let sync = |path: &PathBuf| File::open(path)?.sync_all();
        self.paths.iter().try_for_each(|path| sync(path).map_err(ConvertError::io(path)))
    }
}

/// Reads a shard.
pub(super) struct Reader<'a> {
    pub source: &'a Path,
    pub files: &'a Files,
    /// Bytes of rows that are quantized at a time.
    pub slab_bytes: usize,
}

impl Reader<'_> {
    /// Writes what is made of all its tensors; `tick` is told of values that are done.
    pub fn convert(&self, planned: &[Planned], sums: &mut Sums, mut tick: impl FnMut(u64)) -> Result<(), ConvertError> {
        let map = plan::map(self.source)?;
        for tensor in planned {
            let broken = || ConvertError::Broken { path: self.source.to_owned(), what: "it became shorter".into() };
            let content = map.get(tensor.span.clone()).ok_or_else(broken)?;
            let squares = match tensor.scheme() {
                Some(scheme) => self.quantize(tensor, scheme, content, &mut tick)?,
                None => {
                    self.files.write(&tensor.name, 0, content)?;
                    tick(tensor.values());
                    Squares::default()
                }
            };
            sums.add(tensor, squares);
        }
        Ok(())
    }

    /// Rows by rows, each slab to its places in the outputs.
    fn quantize(
        &self,
        tensor: &Planned,
        scheme: Scheme,
        content: &[u8],
        tick: &mut impl FnMut(u64),
    ) -> Result<Squares, ConvertError> {
        let mlx = |error: Exception| ConvertError::Mlx(error.what().to_string());
        let columns = tensor.columns();
        let row_bytes = columns * tensor.dtype.bitsize() / 8;
        let rows_at_a_time = (self.slab_bytes / row_bytes.max(1)).max(1);
        let mut squares = Squares::default();
        let outputs = tensor.parts();
        let mut written: Vec<u64> = outputs.iter().map(|output| tensor.offset(output)).collect();
        for slab in content.chunks(rows_at_a_time * row_bytes) {
            let rows = slab.len() / row_bytes;
            let shape = [rows, columns].map(|size| i32::try_from(size).unwrap_or(i32::MAX));
            let dtype = match tensor.dtype {
                safetensors::Dtype::F16 => Dtype::Float16,
                safetensors::Dtype::BF16 => Dtype::Bfloat16,
                _ => Dtype::Float32,
            };
            let values = ffi::from_bytes(slab, &shape, dtype)
                .ok_or_else(|| ConvertError::Mlx(format!("no array of `{}`", tensor.name)))?;
            let packed = ffi::quantize(&values, scheme.group_size, scheme.bits, scheme.mode).map_err(mlx)?;
            let sums = squares_of(&values, &packed).map_err(mlx)?;
            if !sums.values.is_finite() {
                let what = format!("tensor `{}` holds values that are not finite", tensor.name);
                return Err(ConvertError::Broken { path: self.source.to_owned(), what });
            }
            squares.values += sums.values;
            squares.differences += sums.differences;
            let parts = [Some(&packed.weight), Some(&packed.scales), packed.biases.as_ref()];
            for ((part, output), at) in parts.into_iter().flatten().zip(&outputs).zip(&mut written) {
                let bytes = ffi::to_bytes(part).map_err(mlx)?;
                self.files.write(&output.name, *at, &bytes)?;
                *at += bytes.len() as u64;
            }
            tick((rows * columns) as u64);
            memory::clear_cache_beyond(FREED_BYTES_MAX);
        }
        let ends = outputs.iter().map(|output| tensor.offset(output) + output.bytes());
        if !written.iter().copied().eq(ends) {
            return Err(ConvertError::Mlx(format!("`{}` was packed into another size than expected", tensor.name)));
        }
        Ok(squares)
    }
}

/// Squares of values and of what packing changes them by. Summed in f32 along rows, in f64 over them.
fn squares_of(values: &Array, packed: &Packed) -> Result<Squares, Exception> {
    let plain = ffi::dequantize(packed)?.as_dtype(Dtype::Float32)?;
    let values = values.as_dtype(Dtype::Float32)?;
    let sum = |array: &Array| -> Result<f64, Exception> {
        let rows = array.square()?.sum_axis(-1, false)?;
        rows.eval()?;
        let rows = rows.to_vec_exact::<f32>().map_err(|error| Exception::custom(error.to_string()))?;
        Ok(rows.into_iter().map(f64::from).sum())
    };
    Ok(Squares { values: sum(&values)?, differences: sum(&plain.subtract(&values)?)? })
}

/// The header with its length before it, where each output begins after it, and how many bytes they have together.
fn header(planned: &[Planned]) -> (Vec<u8>, Vec<(String, u64)>, u64) {
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "format": "mlx" }));
    let (mut starts, mut end) = (Vec::new(), 0);
    // Codes and 32-bit floats first, so that everything is aligned.
    let mut outputs: Vec<Output> = planned.iter().flat_map(Planned::outputs).collect();
    outputs.sort_by_key(|output| std::cmp::Reverse(output.dtype.bitsize()));
    for output in outputs {
        let start = end;
        end += output.bytes();
        let entry = json!({
            "dtype": format!("{:?}", output.dtype), "shape": output.shape, "data_offsets": [start, end],
        });
        entries.insert(output.name.clone(), entry);
        starts.push((output.name, start));
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(ALIGNMENT), b' ');
    ([&(text.len() as u64).to_le_bytes()[..], &text].concat(), starts, end)
}
