//! Reading a request's body within bounds.

use std::{pin::pin, time::Duration};

use futures::{Stream, StreamExt};
use warp::Buf;

use crate::{
    error::ApiError,
    record::{Record, body_bytes_max},
};

/// Longest body that is read unless another bound is set, in bytes.
pub const BODY_BYTES_MAX: u64 = 16 << 20;

/// Most bytes of a body that is too long which are read and thrown away, so that the client gets to see the answer
/// rather than a reset connection.
pub const DISCARD_BYTES_MAX: u64 = 512 << 20;

/// Longest silence within a body.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Longest that a whole body may take, however steadily it comes.
const BODY_TIMEOUT: Duration = Duration::from_secs(300);

/// Reads the whole body, or says why not. `length` is what `content-length` announced; `waiting` is true for clients
/// that wait to be told to go on (`expect: 100-continue`), whose body is not even asked for if it is too long.
pub async fn read<B: Buf>(
    length: Option<u64>,
    waiting: bool,
    body: impl Stream<Item = Result<B, warp::Error>>,
) -> Result<Vec<u8>, ApiError> {
    let max = body_bytes_max();
    let deadline = tokio::time::Instant::now() + BODY_TIMEOUT;
    let too_large = length.is_some_and(|length| length > max);
    if too_large && (waiting || length.is_some_and(|length| length > DISCARD_BYTES_MAX)) {
        return Err(ApiError::body_too_large(max));
    }
    let mut body = pin!(body);
    let mut bytes = Vec::new();
    let mut seen = 0u64;
    loop {
        let chunk =
            match tokio::time::timeout_at(deadline.min(tokio::time::Instant::now() + SILENCE_MAX), body.next()).await {
                Err(_) => return Err(ApiError::body_too_slow()),
                Ok(None) if too_large || seen > max => return Err(ApiError::body_too_large(max)),
                Ok(None) => {
                    if let Some(record) = Record::current() {
                        record.asked(&bytes);
                    }
                    return Ok(bytes);
                }
                Ok(Some(Err(_))) => return Err(ApiError::body_broken()),
                Ok(Some(Ok(chunk))) => chunk,
            };
        seen += chunk.remaining() as u64;
        if seen > DISCARD_BYTES_MAX {
            return Err(ApiError::body_too_large(max));
        }
        if too_large || seen > max {
            bytes = Vec::new();
        } else {
            let mut chunk = chunk;
            while chunk.has_remaining() {
                let part = chunk.chunk();
                bytes.extend_from_slice(part);
                let read = part.len();
                chunk.advance(read);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures::stream;

    use super::*;

    async fn status(length: Option<u64>, waiting: bool, chunks: usize) -> Result<usize, u16> {
        let chunk = Bytes::from(vec![b' '; 1 << 20]);
        let body = stream::iter((0..chunks).map(move |_| Ok(chunk.clone())));
        read(length, waiting, body).await.map(|bytes| bytes.len()).map_err(|error| error.status().as_u16())
    }

    #[tokio::test]
    async fn bodies_are_bounded_with_and_without_an_announcement() {
        assert_eq!(status(None, false, 16).await, Ok(16 << 20));
        assert_eq!(status(None, false, 17).await, Err(413));
        assert_eq!(status(Some(100 << 20), false, 100).await, Err(413));
        assert_eq!(status(None, false, 600).await, Err(413));
    }

    #[tokio::test]
    async fn a_client_that_waits_is_told_before_it_sends() {
        let body = stream::pending::<Result<Bytes, warp::Error>>();
        let refused = tokio::time::timeout(Duration::from_secs(5), read(Some(100 << 20), true, body)).await;
        assert_eq!(refused.unwrap().unwrap_err().status().as_u16(), 413);
    }
}
