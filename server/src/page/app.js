// The page: what is typed becomes a request, and what comes back becomes a turn.

import { ServerError, stream } from './client.js';
import { add, assistantTurn, messages, progress, userTurn } from './conversation.js';
import * as models from './models.js';
import * as mesh from './mesh.js';
import * as settings from './settings.js';
import { grow, show, toEnd } from './transcript.js';

const element = (id) => document.getElementById(id);
const prompt = element('prompt');
const touch = matchMedia('(pointer: coarse)');

let turns = [];
const views = new Map();
let running = null;

function announce(text) {
  element('status').textContent = text;
}

function notice(text) {
  element('notice').textContent = text ?? '';
  element('notice').hidden = !text;
}

let complained = false;
const watching = {
  failed(error) {
    const unreachable = 'The server does not answer. It is asked again every few seconds.';
    if (error) notice(error.status ? error.message : unreachable);
    else if (complained) notice(null);
    complained = Boolean(error);
  },
  watch: () => running?.turn.state === 'waiting' && models.status() !== 'ready',
};
const look = () => models.refresh(settings.key, watching);

const on = {
  edit(turn, content) {
    if (!request()) return;
    cut(turns.indexOf(turn));
    say(content);
  },
  regenerate(turn) {
    if (!request()) return;
    cut(turns.indexOf(turn));
    answer();
  },
  results(turn, texts) {
    if (!request()) return;
    cut(turns.indexOf(turn) + 1);
    turn.calls.forEach((call, at) => { call.result ??= texts[at]; });
    views.get(turn).draw();
    answer();
  },
};

function append(turn) {
  turns.push(turn);
  views.set(turn, show(turn, on));
  element('welcome').hidden = true;
  toEnd();
}

// Drops the turns from `at` on, and with them the answer that is being written.
function cut(at) {
  stop();
  for (const turn of turns.splice(at)) {
    views.get(turn).remove();
    views.delete(turn);
  }
}

// What would be sent, or nothing where it cannot be, which the notice then tells.
function request() {
  try {
    if (!models.chosen()) throw new Error('There is no model to ask yet.');
    const knobs = settings.knobs();
    notice(null);
    return { model: models.chosen(), messages: messages(settings.system(), turns), ...knobs };
  } catch (error) {
    notice(error.message);
    return null;
  }
}

function say(content) {
  append(userTurn(content));
  answer();
}

function stop() {
  running?.abort.abort();
}

function busy(yes) {
  element('send').hidden = yes;
  element('stop').hidden = !yes;
}

async function answer() {
  const body = request();
  if (!body) return;
  stop();
  const turn = assistantTurn();
  append(turn);
  const view = views.get(turn);
  const mine = { turn, abort: new AbortController() };
  running = mine;
  busy(true);
  announce('Waiting for an answer.');
  if (models.status() !== 'ready') {
    turn.progress = { text: 'Waiting for the model to be loaded' };
    view.update();
    setTimeout(look, 200);
  }
  try {
    await stream(body, settings.key(), mine.abort.signal, {
      comment(text) {
        turn.progress = progress(text) ?? turn.progress;
        view.update();
      },
      chunk(chunk) {
        // The first chunk names the role: the model is there.
        if (turn.state === 'waiting') turn.progress = null;
        add(turn, chunk);
        view.update();
      },
    });
    turn.state = 'done';
    announce('The answer is complete.');
  } catch (error) {
    if (mine.abort.signal.aborted) {
      turn.state = 'stopped';
      announce('Stopped.');
    } else {
      turn.state = 'failed';
      turn.error = error instanceof ServerError ? error.message : `The connection broke: ${error.message}`;
    }
  }
  view.draw();
  if (running === mine) {
    running = null;
    busy(false);
    look();
  }
}

function send() {
  if (running || !prompt.value.trim() || !request()) return;
  const content = prompt.value;
  prompt.value = '';
  grow(prompt);
  say(content);
}

prompt.addEventListener('input', () => grow(prompt));
prompt.addEventListener('keydown', (event) => {
  // On a screen's keyboard Enter is the only way to a new line.
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing || touch.matches) return;
  event.preventDefault();
  send();
});
element('composer').addEventListener('submit', (event) => {
  event.preventDefault();
  send();
  prompt.focus();
});
element('stop').addEventListener('click', () => {
  stop();
  prompt.focus();
});
element('new-chat').addEventListener('click', () => {
  cut(0);
  notice(null);
  element('welcome').hidden = false;
  announce('A new chat.');
  prompt.focus();
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && running) stop();
});
addEventListener('focus', look);
element('model').addEventListener('focus', look);

settings.start(look, (open) => mesh.watch(open, settings.key));
look();
