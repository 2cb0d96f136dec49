// What is wrong, since when and what to do; the checks with their history; the last changes.

import {
  Cell,
  Component,
  Empty,
  Head,
  ItemRow,
  Remote,
  Row,
  Table,
  Text,
  Time,
  Word,
  html,
  milliseconds,
  plural,
  span,
  utc,
} from "./parts.js";
import { address } from "./client.js";

/** For a code of any check, then for a check: the heading of the runbook and the first step. */
const BY_CODE = {
  __proto__: null,
  schema_behind: ["ViralFXNotReady", "Run viralfx migrate with the version of this process."],
  not_migrated: ["ViralFXNotReady", "Run viralfx migrate."],
  stale: ["ViralFXCheckStale", "The check has not completed an attempt: the event loop is blocked, or the check hangs."],
  pool_exhausted: ["ViralFXPoolExhausted", "Find slow statements, or start more instances."],
  read_only: ["ViralFXRedisImpaired", "Promote the replica, or set REDIS_HOST to the primary."],
  memory_full: ["ViralFXRedisImpaired", "Raise maxmemory, or set a policy that evicts keys."],
  writes_refused: ["ViralFXRedisImpaired", "Free the disk of Redis, or start its replicas."],
  circuit_open: ["ViralFXCircuitOpen", "Repair the dependency that the circuit is named after."],
};
const BY_CHECK = {
  __proto__: null,
  database: ["ViralFXDatabaseDown", "Look whether Postgres runs and whether the network reaches it; the code names the cause."],
  redis: ["ViralFXRedisDown", "Look whether Redis runs and whether the network reaches it; the service works without it, more slowly."],
  memory: ["ViralFXMemoryHigh", "Compare the growth of memory with the last deployments; restart instances one after another."],
  queues: ["ViralFXQueueBacklog", "Look whether workers consume the queue and whether their jobs fail."],
  circuits: ["ViralFXCircuitOpen", "Repair the dependency that the circuit is named after."],
};

function remedy(check) {
  if (check.name === "redis" && check.code === "pool_exhausted") return BY_CODE.writes_refused;
  if (check.name === "queues" && /no worker/.test(check.message)) {
    return ["ViralFXQueueUnattended", "Start workers that consume the queue."];
  }
  return BY_CODE[check.code] || BY_CHECK[check.name] || ["ViralFXCheckFailing", "The code names the cause; the log line with the correlation id has the error."];
}

const RANK = { fail: 0, warn: 1, pass: 2 };

const named = (checks) => checks.map((check) => check.name).join(", ");

/** Return the names of some checks with their codes, and a verb for them. */
function faults(checks, one, many) {
  const names = checks.slice(0, 4).map((check) => `${check.name}${check.code ? ` (${check.code})` : ""}`);
  const more = checks.length > 4 ? ` and ${checks.length - 4} more` : "";
  return `${names.join(", ")}${more} ${checks.length > 1 ? many : one}`;
}

/**
 * Return the state of the process: `kind`, the sentence `text`, the `checks` behind it and the time
 * `since`. The text changes with the state only, so that a screen reader says each state once.
 */
export function verdict({ data }) {
  const { state, checks } = data;
  const failing = checks.filter((check) => check.status === "fail");
  const warning = checks.filter((check) => check.status === "warn");
  const gates = failing.filter((check) => data.failingGates.includes(check.name));
  if (data.stop && data.stop.reason) {
    const stage = data.stop.stages.filter((each) => each.state === "running").at(-1);
    const where = stage ? `stage ${stage.name}` : "the stop has begun";
    return { kind: "fair", text: `Shutting down (${data.stop.reason}): ${where}.`, checks: failing, since: state.at };
  }
  if (state.state === "starting") {
    const waiting = checks.filter((check) => !check.checkedAt || data.failingGates.includes(check.name));
    const cause = waiting.length ? `, and waits for ${named(waiting)}` : "";
    return { kind: "fair", text: `Not ready: the process is starting${cause}.`, checks: failing, since: state.at };
  }
  const word = data.health === "unhealthy" ? "Unhealthy" : "Degraded";
  const kind = data.health === "unhealthy" ? "bad" : "fair";
  const others = failing.filter((check) => !gates.includes(check));
  if (gates.length && data.failOpen) {
    return { kind: "bad", text: `${word}: ${faults(gates, "fails", "fail")}; ready nevertheless, READINESS_FAIL_OPEN_AFTER has passed.`, checks: [...gates, ...others], since: gates[0].since };
  }
  if (state.state === "not_ready" || gates.length) {
    const cause = gates.length ? faults(gates, "fails", "fail") : state.reason;
    return { kind: "bad", text: `Not ready: ${cause}.`, checks: [...gates, ...others], since: gates.length ? gates[0].since : state.at };
  }
  if (failing.length) {
    return { kind, text: `${word}: ${faults(failing, "fails", "fail")}.`, checks: [...failing, ...warning], since: failing[0].since };
  }
  if (warning.length) {
    return { kind, text: `${word}: ${faults(warning, "warns", "warn")}.`, checks: warning, since: warning[0].since };
  }
  const since = checks.map((check) => check.since).sort().at(-1) || state.at;
  const passing = checks.length === 1 ? "the check passes" : `all ${checks.length} checks pass`;
  return { kind: "good", text: checks.length ? `Healthy: ${passing}.` : "Healthy.", checks: [], since };
}

/** Return the sentence of the moment: the state of the process, or why it is not known. */
export function sentence(live, paused) {
  const { data, phase } = live;
  const at = (moment) => `${utc(moment, live.now())} UTC`;
  if (phase === "gone" && live.gone) {
    return { kind: "idle", text: `Ended: the process completed its stop (${data.stop.reason}) at ${at(live.gone.at)}.` };
  }
  const stopping = data && data.stop && data.stop.reason;
  const port = stopping ? " It was shutting down: this port has closed, and the management port closes last." : "";
  const texts = {
    off: "the page takes no events while it is hidden.",
    connecting: "no event has arrived yet.",
    silent: live.lastEvent
      ? `no event since ${at(live.eventAt)}. The process, its event loop or the connection may hang.`
      : "the connection is open, and no event arrives. A proxy may hold events back: open the page without it.",
    lost: live.refused
      ? `no event since ${at(live.since)}. ${live.refused} The page tries again every second.`
      : `no answer since ${at(live.since)}.${port} The page tries again every second.`,
    failed: "this page cannot read the data of the process. Load it again.",
    denied: "reading needs a token.",
  };
  const cause = paused ? `updates are paused since ${at(live.since)}.` : texts[phase];
  if (!cause && data) return verdict(live);
  const last = data ? ` The last state was ${data.state.state.replaceAll("_", " ")}.` : "";
  const quiet = paused || phase === "off" || phase === "connecting";
  return { kind: quiet ? "fair" : "bad", text: `Disconnected: ${cause || texts.connecting}${last}` };
}

function Runbook({ heading, base }) {
  return base
    ? html`<a href=${`${base}#${heading.toLowerCase()}`} rel="noreferrer" target="_blank">Runbook: ${heading}</a>`
    : html`<span>Runbook: <code>${heading}</code></span>`;
}

function Verdict({ live, runbook }) {
  const { kind, checks, since } = verdict(live);
  return html`<section class=${`verdict ${live.fresh || live.phase === "gone" ? kind : "idle"}`} aria-label="Verdict">
    ${since ? html`<p>Since <${Time} at=${since} now=${live.now()} both=${true} />, ${span((live.now() - Date.parse(since)) / 1000)} ago.</p>` : null}
    ${checks.slice(0, 4).map((check) => {
      const [heading, step] = remedy(check);
      return html`<p key=${check.name}><strong>${check.name}</strong>: ${check.message}${check.code ? html` (<code>${check.code}</code>)` : ""}. ${step} <${Runbook} heading=${heading} base=${runbook} /></p>`;
    })}
    ${checks.length > 4 ? html`<p>${plural(checks.length - 4, "more check")} below.</p>` : null}
    ${troubles(live.data).map((line) => html`<p>${line}</p>`)}
  </section>`;
}

/** Return a line for each paused queue and each open circuit. */
function troubles(data) {
  const open = data.circuits.filter((circuit) => circuit.state !== "CLOSED");
  const paused = data.queues ? data.queues.items.filter((queue) => queue.paused) : [];
  return [
    ...(open.length ? [html`<a href="#/circuits">${plural(open.length, "circuit is", "circuits are")} not closed</a>: ${named(open)}.`] : []),
    ...(paused.length ? [html`<a href="#/queues">${plural(paused.length, "queue is", "queues are")} paused</a>: ${named(paused)}.`] : []),
  ];
}

const SLOTS = 48;
const HEIGHTS = { pass: 7, warn: 11, fail: 16, unknown: 1.5 };
const WORST = ["unknown", "pass", "warn", "fail"];

/** The worst status in each half hour, as bars: the height repeats the colour. */
function Strip({ history, from, to, name }) {
  if (!history) return html`<span class="quiet">no history</span>`;
  const start = Date.parse(from);
  const width = (Date.parse(to) - start) / SLOTS;
  const worst = new Array(SLOTS).fill(0);
  history.segments.forEach((segment, index) => {
    const next = history.segments[index + 1];
    const begins = Math.max(0, Math.floor((Date.parse(segment.at) - start) / width));
    const until = next ? Date.parse(next.at) : Date.parse(to);
    const ends = Math.min(SLOTS - 1, Math.ceil((until - start) / width) - 1);
    for (let slot = begins; slot <= Math.max(begins, ends) && slot < SLOTS; slot += 1) {
      worst[slot] = Math.max(worst[slot], WORST.indexOf(segment.status));
    }
  });
  const paths = { pass: "", warn: "", fail: "", unknown: "" };
  worst.forEach((rank, slot) => {
    const status = WORST[rank] || "unknown";
    const height = HEIGHTS[status];
    paths[status] += `M${slot * 4} ${16 - height}h3v${height}h-3z`;
  });
  const share = history.uptime == null ? "no data" : `${history.uptime.toFixed(1)} % of the time without failure`;
  return html`<span class="strip"><svg viewBox="0 0 192 16" role="img" aria-label=${`Last 24 hours of ${name}: ${share}`}>
    ${Object.entries(paths).map(([status, d]) => (d ? html`<path class=${status} d=${d} />` : null))}
  </svg> <span>${history.uptime == null ? "" : `${history.uptime.toFixed(1)} %`}</span></span>`;
}

function Segments({ history, from, to, now }) {
  if (!history || !history.segments.length) return html`<${Empty}>No status of this check is known for the last 24 hours.<//>`;
  const rows = history.segments.slice(-20).map((segment, index, all) => {
    const next = all[index + 1];
    const length = (Date.parse(next ? next.at : to) - Math.max(Date.parse(segment.at), Date.parse(from))) / 1000;
    return html`<${Row} key=${segment.at}><${Head}><${Time} at=${segment.at} now=${now} /><//>
      <${Cell} label="Status"><${Word} of=${segment.status} /><//><${Cell} label="For">${span(length)}<//>
      <${Cell} label="Instance">${segment.instance}<//><//>`;
  });
  return html`<${Table} caption="Status in the last 24 hours, UTC" columns=${["From", "Status", "For", "Instance"]}>${rows.reverse()}<//>`;
}

export class StatusView extends Remote {
  constructor(props) {
    super(props);
    this.every = 60000;
    this.state.open = [];
    this.state.busy = false;
  }

  path() {
    return `${address("status", "history")}?hours=24`;
  }

  componentDidUpdate(...changes) {
    super.componentDidUpdate(...changes);
    const { data } = this.props;
    if (!data) return;
    const last = data.changes.at(-1);
    const at = last ? last.at : "";
    if (this.changedAt != null && at !== this.changedAt) this.load();
    this.changedAt = at;
  }

  async checkNow() {
    this.setState({ busy: true });
    await this.props.app.act(address("status", "checks", "run"), {}, (result) => `All checks have run: ${result.health}.`);
    this.setState({ busy: false });
  }

  render({ live, data, operates, session }, { open, busy, data: past, error }) {
    if (!data) return html`<p class="loading">Waiting for the first event …</p>`;
    const now = live.now();
    const sorted = [...data.checks].sort((one, other) => RANK[one.status] - RANK[other.status]);
    const toggle = (name) => this.setState({ open: open.includes(name) ? open.filter((each) => each !== name) : [...open, name] });
    return html`<div class=${live.fresh ? "" : "stale"}>
      <${Verdict} live=${live} runbook=${session.runbook} />
      <section aria-labelledby="checks"><h2 id="checks">Checks</h2>
      ${operates ? html`<p><button type="button" disabled=${busy} onClick=${() => this.checkNow()}>Check now</button></p>` : null}
      ${error ? html`<p class="quiet">The history is not available: ${error.message}</p>` : null}
      ${sorted.length
        ? html`<${Table} caption="Checks of this process, failing first. Times are UTC." columns=${["Check", "Status", "Since", "Last 24 h", "Response", "Message"]}>
          ${sorted.map((check) => html`<${CheckRows} key=${check.name} check=${check} now=${now} past=${past} open=${open.includes(check.name)} toggle=${toggle} age=${span((now - Date.parse(check.since)) / 1000)} />`)}
        <//>`
        : html`<${Empty}>This process has no checks.<//>`}
      </section>
      <section aria-labelledby="recent"><h2 id="recent">Changes</h2>
      ${data.changes.length
        ? html`<ul class="lines">${data.changes.slice(-10).reverse().map((change) => html`<li key=${change.at + change.check}><${Time} at=${change.at} now=${now} /> <strong>${change.check}</strong> ${change.old || "unknown"} → <${Word} of=${change.new} />${change.code ? html` <code>${change.code}</code>` : null} ${change.message || ""}</li>`)}</ul>`
        : html`<${Empty}>No check has changed since the start.<//>`}
      <p><a href="#/changes">All changes of the fleet</a></p></section>
      ${data.queues && data.queues.items.length
        ? html`<section aria-labelledby="work"><h2 id="work">Queues</h2><ul class="lines">${data.queues.items.map((queue) => {
            const failed = `${queue.counts.failed} failed`;
            return html`<li key=${queue.name}><strong>${queue.name}</strong> ${queue.paused ? html`<${Word} of="paused" /> ` : ""}${queue.counts.waiting} waiting · ${queue.counts.active} running · ${plural(queue.consumers, "worker")} · ${
              queue.counts.failed ? html`<a href=${`#/jobs?${new URLSearchParams({ queue: queue.name, state: "failed" })}`}>${failed}</a>` : failed
            }</li>`;
          })}</ul></section>`
        : null}
    </div>`;
  }
}
StatusView.ticks = true;

class CheckRows extends Component {
  shouldComponentUpdate(next) {
    const { check, past, open, age } = this.props;
    return check !== next.check || past !== next.past || open !== next.open || age !== next.age;
  }

  render({ check, now, past, open, toggle, age }) {
    const history = past && Object.hasOwn(past.checks, check.name) && past.checks[check.name];
    const { from, to } = past || {};
    const traits = [check.critical ? "critical" : "", check.gates ? "gates readiness" : ""].filter(Boolean).join(", ");
    return [
      html`<${Row} key="row" class=${check.status}>
        <${Head}><button type="button" class="toggle" aria-expanded=${open ? "true" : "false"} onClick=${() => toggle(check.name)}>${check.name}</button><//>
        <${Cell} label="Status"><${Word} of=${check.status} />${check.code ? html` <code>${check.code}</code>` : null}<//>
        <${Cell} label="Since"><${Time} at=${check.since} now=${now} /> <span class="quiet">${age}</span><//>
        <${Cell} label="Last 24 h"><${Strip} history=${history} from=${from} to=${to} name=${check.name} /><//>
        <${Cell} label="Response">${milliseconds(check.responseMs)}<//>
        <${Cell} label="Message">${check.message}<//><//>`,
      open
        ? html`<${Row} key="more" class="more"><td role="cell" colspan="6">
          <p>${traits ? `${traits}. ` : ""}Runs every ${milliseconds(check.intervalMs)}. Last run <${Time} at=${check.checkedAt} now=${now} both=${true} />.
          ${check.correlationId ? html` Correlation id <code>${check.correlationId}</code>.` : ""}</p>
          <h3>Details</h3><${Text}>${JSON.stringify(check.details, null, 2)}<//>
          ${past ? html`<${Segments} history=${history} from=${from} to=${to} now=${now} />` : null}
          <p><a href=${`#/changes?${new URLSearchParams({ check: check.name })}`}>Changes of ${check.name}</a></p></td><//>`
        : null,
    ];
  }
}

/** The changes of all checks of the fleet, by check and instance. */
export class ChangesView extends Remote {
  constructor(props) {
    super(props);
    this.every = 5000;
  }

  path() {
    return `${address("fleet", "changes")}?${this.props.query ? `${this.props.query}&` : ""}limit=200`;
  }

  render({ app, query }, { data, loading }) {
    const filter = Object.fromEntries(new URLSearchParams(query));
    const set = (name) => (event) => {
      const next = { ...filter, [name]: event.target.value.trim() };
      app.go("changes", new URLSearchParams(Object.entries(next).filter(([, value]) => value)).toString());
    };
    return html`<form class="filters" onSubmit=${(event) => event.preventDefault()}>
      <label>Check <input type="search" value=${filter.check || ""} onChange=${set("check")} /></label>
      <label>Instance <input type="search" value=${filter.instance || ""} onChange=${set("instance")} /></label></form>
      ${this.notice()}
      ${data ? html`<p class="quiet">${data.kept === "memory" ? "Kept in the memory of this process." : "Kept in Postgres for 7 days."}</p>` : null}
      ${data && data.items.length
        ? html`<${Table} busy=${loading} caption="Changes, the newest first. Times are UTC." columns=${["At", "Check", "Change", "Code", "Instance"]}>
          ${data.items.map((item) => html`<${ItemRow} key=${`${item.at} ${item.check} ${item.instance}`} item=${item} show=${changeRow} />`)}<//>`
        : data ? html`<${Empty}>No change matches.<//>` : null}`;
  }
}

const changeRow = (item) => html`<${Row}><${Head}><${Time} at=${item.at} /><//><${Cell} label="Check">${item.check}<//>
  <${Cell} label="Change">${item.old || "unknown"} → <${Word} of=${item.new} /><//>
  <${Cell} label="Code">${item.code ? html`<code>${item.code}</code>` : ""}<//><${Cell} label="Instance">${item.instance}<//><//>`;
