// The server's API, as far as the page needs it.

import { createParser } from './vendor/eventsource-parser/parse.js';

// Longest event that is put together, in characters.
const EVENT_MAX = 32 << 20;

// What the server said was wrong, in its own words.
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(key, more = {}) {
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function refusal(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    const message = typeof error === 'string' ? error : error.message;
    if (message) return new ServerError(message, response.status);
  } catch {
    // Not the server's own: something in between answered.
  }
  const said = text.trim().slice(0, 300);
  return new ServerError(`${response.status} ${response.statusText}${said ? `: ${said}` : ''}`, response.status);
}

// The list of models.
export async function models(key) {
  const response = await fetch('v1/models', { headers: headers(key), cache: 'no-store' });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data;
}

// Other machines, by where they come from.
export async function others(key) {
  const response = await fetch('v1/mesh', { headers: headers(key), cache: 'no-store' });
  if (!response.ok) throw await refusal(response);
  return (await response.json()).sources;
}

// Why a request for a model would go where it goes now.
export async function route(model, key) {
  const response = await fetch(`v1/mesh/routes/${encodeURIComponent(model)}`, { headers: headers(key), cache: 'no-store' });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

// Streams one answer. `on` has `comment(text)` and `chunk(object)`. Resolves when the answer is whole.
export async function stream(request, key, signal, on) {
  const response = await fetch('v1/chat/completions', {
    method: 'POST',
    headers: headers(key, { 'content-type': 'application/json' }),
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    cache: 'no-store',
    signal,
  });
  if (!response.ok) throw await refusal(response);
  let done = false;
  const parser = createParser({
    maxBufferSize: EVENT_MAX,
    onComment: (text) => on.comment(text.trim()),
    onEvent: ({ event, data }) => {
      if (data === '[DONE]') {
        done = true;
        return;
      }
      const chunk = JSON.parse(data);
      if (event === 'error' || chunk.error) throw new ServerError(chunk.error?.message ?? data, response.status);
      on.chunk(chunk);
    },
    onError: (error) => {
      // Fields that nobody knows are ignored, as the standard has it.
      if (error.type === 'max-buffer-size-exceeded') throw error;
    },
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    while (!done) {
      const { value, done: over } = await reader.read();
      if (over) throw new ServerError('the connection ended before the answer did', response.status);
      parser.feed(value);
    }
  } finally {
    // Nobody waits for this: a connection that was aborted has nothing left to cancel.
    reader.cancel().catch(() => {});
  }
}
