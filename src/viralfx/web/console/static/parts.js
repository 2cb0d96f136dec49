// What all views are made of: the template tag, times, words beside colours, tables, loading data.

import { Component, createRef, h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";
import { get } from "./client.js";

export { Component, createRef };

/** Characters that change the order of the text around them, and out of any isolated part. */
const CONTROLS = /[\u202a-\u202e\u2066-\u2069]/g;
const FROM_RIGHT = /[\u0590-\u08ff\u200f\ufb1d-\ufefc\ud802\ud803\ud83a\ud83b]/;

/** Text as part of an element: no name or message changes how the text around it reads. */
function plain(child) {
  if (Array.isArray(child)) return child.map(plain);
  if (typeof child !== "string") return child;
  const text = child.replace(CONTROLS, (one) => `\\u${one.charCodeAt(0).toString(16)}`);
  return FROM_RIGHT.test(text) ? h("bdi", null, text) : text;
}

export const html = htm.bind((type, props, ...children) =>
  h(type, props, ...(typeof type === "string" ? children.map(plain) : children)),
);

const two = (number) => String(number).padStart(2, "0");

/** Return a UTC time of day, with the date unless it is the day of `now`. */
export function utc(moment, now = Date.now()) {
  const at = new Date(moment);
  if (!Number.isFinite(at.getTime())) return "unknown";
  const text = at.toISOString();
  const time = text.slice(11, 19);
  return text.slice(0, 10) === new Date(now).toISOString().slice(0, 10)
    ? time
    : `${text.slice(0, 10)} ${time}`;
}

// Without the formats of the browser's language: the first one of a page costs as much as a view.
const localTime = (at) => `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;

function local(at) {
  const minutes = -at.getTimezoneOffset();
  const sign = minutes < 0 ? "-" : "+";
  const zone = `UTC${sign}${two(Math.floor(Math.abs(minutes) / 60))}:${two(Math.abs(minutes) % 60)}`;
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return `${day} ${localTime(at)} here (${zone})`;
}

/** A time in UTC with the local time as title; `both` shows the local time as well. */
export function Time({ at, now, both }) {
  if (!at) return html`<span>never</span>`;
  const moment = new Date(at);
  if (!Number.isFinite(moment.getTime())) return html`<span>unknown</span>`;
  const apart = both && moment.getTimezoneOffset() !== 0;
  return html`<time datetime=${moment.toISOString()} title=${local(moment)}>${utc(moment, now)}${
    both ? " UTC" : ""
  }${apart ? `, ${localTime(moment)} here` : ""}</time>`;
}

/** Return a duration in words; seconds below a minute have one digit if they are few. */
export function span(seconds) {
  if (seconds == null || !Number.isFinite(seconds)) return "unknown";
  const value = Math.max(0, seconds);
  if (value < 10) return `${Math.round(value * 10) / 10} s`;
  if (value < 90) return `${Math.round(value)} s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${minutes % 60} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export const milliseconds = (value) =>
  value == null ? "" : value < 1000 ? `${Math.round(value * 10) / 10} ms` : span(value / 1000);

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

const KINDS = {
  good: "pass healthy ready ok completed closed running live",
  bad: "fail unhealthy failed open timeout silent lost crashed error",
  fair: "warn degraded not_ready lame_duck draining half_open paused retrying starting",
};
/** The sign of each kind of word. */
export const SIGNS = { good: "✓", bad: "✕", fair: "!", idle: "·" };

function kindOf(word) {
  const lower = String(word).toLowerCase();
  return Object.keys(KINDS).find((kind) => KINDS[kind].split(" ").includes(lower)) || "idle";
}

/** A word with a sign and a colour: no state is shown by colour alone. */
export function Word({ of, kind = kindOf(of), children }) {
  return html`<span class=${`word ${kind}`}><span aria-hidden="true">${SIGNS[kind]}</span> ${
    children || String(of).replaceAll("_", " ").toLowerCase()
  }</span>`;
}

/** A table that turns into blocks on a narrow screen; the roles keep it a table there. */
export function Table({ caption, columns, busy, children, ...more }) {
  return html`<table role="table" aria-busy=${busy ? "true" : "false"} ...${more}>
    <caption>${caption}</caption>
    <thead role="rowgroup"><tr role="row">${columns.map(
      (column) => html`<th role="columnheader" scope="col">${column}</th>`,
    )}</tr></thead>
    <tbody role="rowgroup">${children}</tbody>
  </table>`;
}

export const Row = ({ children, ...more }) => html`<tr role="row" ...${more}>${children}</tr>`;
export const Head = ({ children }) => html`<th role="rowheader" scope="row">${children}</th>`;
export const Cell = ({ label, children, ...more }) =>
  html`<td role="cell" data-label=${label} ...${more}>${children}</td>`;

/** A component that renders again only if its properties or its state differ. */
export class Pure extends Component {
  shouldComponentUpdate(props, state) {
    return differs(this.props, props) || differs(this.state, state);
  }
}

function differs(one, other) {
  const names = new Set([...Object.keys(one || {}), ...Object.keys(other || {})]);
  for (const name of names) {
    if (name !== "children" && one[name] !== other[name]) return true;
  }
  return false;
}

/** A row that renders again only if the item of its data differs by value. */
export class ItemRow extends Component {
  shouldComponentUpdate(props) {
    const fixed = (key) => key === "item" || key === "show";
    for (const key of Object.keys(props)) {
      if (!fixed(key) && props[key] !== this.props[key]) return true;
    }
    return (
      props.item !== this.props.item && JSON.stringify(props.item) !== JSON.stringify(this.props.item)
    );
  }

  render({ show, item }) {
    return show(item);
  }
}

/**
 * A view of data that the process returns for `path()`. It loads them again after `every`
 * milliseconds, when the path changes and when the property `revision` changes; it keeps the last
 * data when a request fails, and says so.
 */
export class Remote extends Pure {
  constructor(props) {
    super(props);
    this.state = { data: null, error: null, at: 0, loading: true };
    this.sequence = 0;
    this.every = 0;
  }

  componentWillMount() {
    this.load(); // Before the first render, so that the process works meanwhile.
  }

  componentDidMount() {
    if (this.every) {
      this.timer = setInterval(() => this.props.active && this.load(), this.every);
    }
  }

  componentWillUnmount() {
    this.sequence = -1;
    clearInterval(this.timer);
  }

  getSnapshotBeforeUpdate() {
    return document.activeElement;
  }

  componentDidUpdate(before, _, focused) {
    const moved = this.shown !== this.path();
    // A link to other data goes with those that it was below: the new ones begin at the heading.
    if ((moved || !this.state.data) && focused && !focused.isConnected) {
      this.props.app.heading.current.focus();
    }
    const woken = this.props.active && !before.active;
    if (moved || before.revision !== this.props.revision || woken) this.load();
  }

  async load() {
    const path = this.path();
    const moved = this.shown !== path;
    if (this.pending && !moved) return;
    // Data of another filter would be shown as if they were of this one.
    if (moved) this.setState({ data: null, error: null, loading: true });
    this.shown = path;
    const sequence = (this.sequence += 1);
    this.pending = true;
    let next;
    try {
      next = { data: await get(path), error: null, at: Date.now() };
    } catch (error) {
      next = { error };
    }
    if (sequence !== this.sequence) return;
    this.pending = false;
    this.setState({ ...next, loading: false });
  }

  /** Load again after a change: an answer that is under way may be older than it. */
  reload() {
    this.pending = false;
    return this.load();
  }

  /** Return what to show around the data: an error, the age of old data, or that they load. */
  notice() {
    const { data, error, at, loading } = this.state;
    if (error) return html`<${Trouble} error=${error} at=${data ? at : 0} retry=${() => this.load()} />`;
    return loading && !data ? html`<p class="loading">Loading …</p>` : null;
  }
}

export const LoadAgain = () =>
  html`<button type="button" onClick=${() => location.reload()}>Load the page again</button>`;

/** A failed request: the error, the time of the shown data, and another attempt; or a failed page. */
export function Trouble({ error, at, retry, page }) {
  const ledger = error.code === "ledger";
  return html`<div class="notice bad">
    <p><${Word} of="error" kind="bad">${ledger ? "The ledger does not answer" : "No data"}<//>: ${error.message}
    ${at ? html` The data below are of <${Time} at=${at} both=${true} />.` : ""}
    ${error.correlationId ? html` Correlation id <code>${error.correlationId}</code>.` : ""}</p>
    <p class="tools">${retry ? html`<button type="button" onClick=${retry}>Try again</button>` : null}
    ${page ? html`<${LoadAgain} />` : null}</p>
  </div>`;
}

/** Shows the error of a view that fails in place of the view; the rest of the page works on. */
export class Guard extends Component {
  static getDerivedStateFromError(error) {
    return { error };
  }

  componentDidCatch(error) {
    console.error(error);
  }

  render({ children }, { error }) {
    return error
      ? html`<${Trouble} error=${error} retry=${() => this.setState({ error: null })} page=${true} />`
      : children;
  }
}

/** A question whose answer is `done(true)` or `done(false)`; `typed` must be typed in first. */
export class Dialog extends Component {
  constructor(props) {
    super(props);
    this.state = { typed: "" };
    this.element = createRef();
  }

  componentDidMount() {
    this.element.current.showModal();
  }

  render({ title, text, label, typed, danger, done }, state) {
    const ready = !typed || state.typed.trim() === typed;
    const submit = (event) => {
      event.preventDefault();
      if (ready) done(true);
    };
    return html`<dialog ref=${this.element} aria-labelledby="dialog-title" onCancel=${(event) => {
      event.preventDefault();
      done(false);
    }}>
      <form onSubmit=${submit}>
        <h2 id="dialog-title">${title}</h2>
        <p>${text}</p>
        ${typed
          ? html`<p><label>Type <code>${typed}</code> to confirm <input type="text" autocomplete="off" spellcheck=${false} value=${state.typed} onInput=${(event) =>
              this.setState({ typed: event.target.value })} /></label></p>`
          : null}
        <p class="tools"><button type="submit" class=${danger ? "danger" : "main"} disabled=${!ready}>${label}</button>
        <button type="button" onClick=${() => done(false)}>Keep as it is</button></p>
      </form>
    </dialog>`;
  }
}

export const Empty = ({ children }) => html`<p class="empty">${children}</p>`;

/** Text of any origin: it keeps its lines and breaks anywhere. */
export const Text = ({ children }) => html`<pre>${children}</pre>`;

/** A share of a budget, with its numbers as text. */
export function Bar({ value, most, label }) {
  const share = most > 0 ? Math.min(1, value / most) : value > 0 ? 1 : 0;
  return html`<svg class=${`bar ${value > most * 1.05 + 100 ? "over" : ""}`} viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label=${label}>
    <rect class="track" width="100" height="8" /><rect class="fill" width=${share * 100} height="8" />
  </svg>`;
}
