// The model picker.

import { models } from './client.js';

const picker = document.getElementById('model');
const state = document.getElementById('model-state');
const welcome = document.getElementById('welcome-model');
const facts = document.getElementById('welcome-facts');

// How often models are looked at while one of them is on its way, and while the server does not answer.
const CHANGING_MS = 1000;
const UNREACHABLE_MS = 5000;

let list = [];
let timer = null;

const SAID = {
  ready: 'ready', loading: 'loading', cold: 'not loaded', unloading: 'unloading', failed: 'failed', stopped: 'stopped',
};

const tokens = (model) => (model.context_length ? `${model.context_length.toLocaleString('en')} tokens` : null);
const said = (model) => [SAID[model.status] ?? model.status, tokens(model)].filter(Boolean).join(', ');

// The chosen model's name.
export const chosen = () => picker.value;

// The chosen model's status, in words.
export const status = () => list.find((model) => model.id === picker.value)?.status;

function draw() {
  const ids = list.map((model) => model.id);
  // An open list would close if it were made anew.
  if (ids.join('\n') !== [...picker.options].map((option) => option.value).join('\n')) {
    // A model may be known by another name once it is loaded; its place in the list stays.
    const [before, at] = [picker.value, picker.selectedIndex];
    picker.replaceChildren(...ids.map((id) => new Option(id, id)));
    if (ids.includes(before)) picker.value = before;
    else if (at > 0 && at < ids.length) picker.selectedIndex = at;
  }
  describe();
}

function describe() {
  for (const [at, model] of list.entries()) {
    // Beside the chosen one the same is said anyway.
    const label = model.id === picker.value ? model.id : `${model.id} (${said(model)})`;
    if (picker.options[at].text !== label) picker.options[at].text = label;
  }
  const model = list.find((model) => model.id === picker.value);
  if (!model) return;
  state.dataset.state = model.status;
  state.textContent = said(model);
  welcome.textContent = model.id;
  const words = [model.backend && `by ${model.backend}`, tokens(model) && `${tokens(model)} of context`];
  const cold = model.status === 'cold' ? ['it is loaded when it is asked for'] : [];
  facts.textContent = [SAID[model.status] ?? model.status, ...words.filter(Boolean), ...cold].join(' · ');
}

// Looks at the models now, and again as long as one is on its way. `watch` says that somebody waits for one.
export async function refresh(key, { failed, watch = () => false }) {
  clearTimeout(timer);
  let next = null;
  try {
    list = await models(key());
    draw();
    failed(null);
    const moving = list.some(({ status }) => status === 'loading' || status === 'unloading');
    if (moving || watch()) next = CHANGING_MS;
  } catch (error) {
    state.dataset.state = 'unknown';
    // A refusal has a reason, which the notice tells; silence is a server that is not there.
    state.textContent = error.status ? 'refused' : 'no answer';
    failed(error);
    if (!error.status) next = UNREACHABLE_MS;
  }
  clearTimeout(timer);
  if (next !== null) timer = setTimeout(() => refresh(key, { failed, watch }), next);
}

picker.addEventListener('change', describe);
