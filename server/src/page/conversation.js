// The conversation as data: what was said, and what of it is sent.

export function userTurn(content) {
  return { role: 'user', content };
}

// `state` is `waiting`, `writing`, `done`, `stopped` or `failed`.
export function assistantTurn() {
  return {
    role: 'assistant', content: '', reasoning: '', calls: [], state: 'waiting',
    progress: null, error: null, finish: null, usage: null,
    began: performance.now(), first: null, last: null, thought: null, pieces: 0,
  };
}

// Adds a chunk to an answer.
export function add(turn, chunk, now = performance.now()) {
  if (chunk.usage) turn.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  if (choice.finish_reason) turn.finish = choice.finish_reason;
  const delta = choice.delta ?? {};
  // Some servers use one name, some the other, some both for the same text.
  const reasoning = delta.reasoning_content ?? delta.reasoning;
  const said = Boolean(reasoning || delta.content || delta.tool_calls?.length);
  if (!said) return;
  turn.state = 'writing';
  turn.progress = null;
  turn.first ??= now;
  turn.last = now;
  turn.pieces += 1;
  if (reasoning) turn.reasoning += reasoning;
  if (delta.content || delta.tool_calls?.length) turn.thought ??= now;
  if (delta.content) turn.content += delta.content;
  for (const part of delta.tool_calls ?? []) {
    const index = part.index ?? turn.calls.length;
    let call = turn.calls.find((call) => call.index === index);
    if (!call) {
      call = { index, id: '', name: '', arguments: '', result: null };
      turn.calls.push(call);
    }
    if (part.id) call.id = part.id;
    call.name += part.function?.name ?? '';
    call.arguments += part.function?.arguments ?? '';
  }
}

// Reads a comment of the stream: how many are ahead, how far the prompt is read.
export function progress(comment) {
  const queued = /^queued, (\d+) ahead$/.exec(comment);
  if (queued) {
    return { text: queued[1] === '0' ? 'Next in line' : `Waiting in line, ${queued[1]} ahead` };
  }
  const reading = /^reading the prompt, (\d+) of (\d+) tokens$/.exec(comment);
  if (reading) {
    const [done, total] = [Number(reading[1]), Number(reading[2])];
    return { text: `Reading the prompt, ${done.toLocaleString('en')} of ${total.toLocaleString('en')} tokens`, done, total };
  }
  return null;
}

// Tokens per second: as counted by the server once it says so, by pieces until then.
export function rate(turn) {
  const seconds = (turn.last - turn.first) / 1000;
  const tokens = turn.usage?.completion_tokens ?? turn.pieces;
  if (turn.first === null || tokens < 2 || seconds < 0.05) return null;
  return { exact: Boolean(turn.usage), value: (tokens - 1) / seconds };
}

// The messages to send for these turns.
export function messages(system, turns) {
  const list = system ? [{ role: 'system', content: system }] : [];
  for (const turn of turns) {
    if (turn.role === 'user') {
      list.push({ role: 'user', content: turn.content });
      continue;
    }
    // An answer that failed before its first word is not part of the conversation.
    if (!turn.content && !turn.reasoning && !turn.calls.length) continue;
    const message = { role: 'assistant', content: turn.content };
    if (turn.reasoning) message.reasoning_content = turn.reasoning;
    if (turn.calls.length) {
      message.tool_calls = turn.calls.map((call) => ({
        id: call.id, type: 'function', function: { name: call.name, arguments: call.arguments },
      }));
    }
    list.push(message);
    for (const call of turn.calls) {
      if (call.result !== null) list.push({ role: 'tool', tool_call_id: call.id, content: call.result });
    }
  }
  return list;
}
