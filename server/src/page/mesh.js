// Other machines: who is there, what they serve, what went to whom, and where the next request would go.

import { others, route } from './client.js';
import { chosen } from './models.js';

const section = document.getElementById('machines');
const note = document.getElementById('machines-note');
const list = document.getElementById('machines-list');
const next = document.getElementById('machines-route');

// How often they are looked at while the panel is seen.
const LOOK_MS = 2000;

let timer = null;
// Counts how often the panel was opened or closed: who looked for an earlier one looks no further.
let turn = 0;

const line = (text, quiet) => {
  const line = document.createElement('span');
  line.textContent = text;
  if (quiet) line.className = 'quiet';
  return line;
};

function machine({ name, offers = [], routable = true, round_trip_ms: trip, sent = 0, failed = 0, served = 0 }) {
  const item = document.createElement('li');
  const models = offers.map((offer) => offer.name).join(', ') || 'no model';
  const way = routable ? trip != null && `${trip.toFixed(1)} ms away` : 'lost';
  const counts = [`${sent} sent there`, failed > 0 && `${failed} failed`, served > 0 && `${served} answered for it`];
  item.append(line(name), line(models, true), line([way, ...counts].filter(Boolean).join(' · '), true));
  return item;
}

function draw(sources) {
  const mesh = sources.find((source) => source.kind === 'mesh')?.status;
  const shared = sources.filter((source) => source.kind !== 'mesh').map(({ status }) => ({
    name: `${status.name} (shared)`, offers: (status.models ?? []).map((model) => ({ name: model.name ?? model })), routable: status.healthy,
  }));
  section.hidden = sources.length === 0;
  note.textContent = mesh ? `Mesh ${mesh.mesh}; this one is ${mesh.node.name}.` : '';
  const machines = [...shared, ...(mesh?.nodes ?? [])].map(machine);
  list.replaceChildren(...machines);
  if (mesh && mesh.nodes.length === 0) list.append(line('No other machine is there.', true));
}

// Of the chosen model. The machines come with what is expected of each, the best one first.
async function drawRoute(key) {
  const model = chosen();
  const { elsewhere, why, machines } = model ? await route(model, key) : { machines: [] };
  const place = elsewhere ? 'on another machine' : 'here';
  next.textContent = model ? [`The next request for ${model} is answered ${place}: ${why}.`, ...machines].join('\n') : '';
}

async function look(key, mine) {
  try {
    const sources = await others(key());
    draw(sources);
    if (sources.length > 0) await drawRoute(key());
  } catch {
    // That the server does not answer, or wants a key, is said where models are.
    section.hidden = true;
  }
  if (mine === turn) timer = setTimeout(() => look(key, mine), LOOK_MS);
}

// Looks at them as long as the panel is seen.
export function watch(open, key) {
  clearTimeout(timer);
  turn += 1;
  if (open) look(key, turn);
}
