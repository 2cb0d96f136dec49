// Queues, schedules, circuits, loggers, settings with the doctor.

import { address } from "./client.js";
import { Cell, Empty, Head, ItemRow, Remote, Row, Table, Time, Word, Pure, html, plural, span } from "./parts.js";

const found = (query) => new URLSearchParams(query).get("find") || "";

/** A field that filters the rows of a view while you type; the text is kept in the address. */
function Find({ app, view, query, label }) {
  return html`<form class="filters" onSubmit=${(event) => event.preventDefault()}><label>${label} <input type="search" value=${found(query)} onInput=${(event) => {
    const text = event.target.value;
    app.go(view, text ? new URLSearchParams({ find: text }).toString() : "", { replace: true });
  }} /></label></form>`;
}

const matches = (query, ...texts) => {
  const wanted = found(query).toLowerCase();
  return texts.some((text) => String(text ?? "").toLowerCase().includes(wanted));
};

export class QueuesView extends Remote {
  constructor(props) {
    super(props);
    this.every = 3000;
  }

  path() {
    return address("queues");
  }

  async set(queue, action) {
    const { app } = this.props;
    const reverse = action === "pause" ? "resume" : "pause";
    const words = { pause: "is paused: workers claim none of its jobs", resume: "runs again" };
    await app.act(address("queues", queue, action), {}, () => `Queue ${queue} ${words[action]}.`, () => this.set(queue, reverse));
    this.reload();
  }

  render({ operates }, { data, loading, error }) {
    return html`<div>${this.notice()}
      ${data && data.items.length
        ? html`<div class=${error ? "stale" : ""}><${Table} busy=${loading} caption="Queues" columns=${["Queue", "State", "Waiting", "Scheduled", "Running", "Failed", "Completed", "Cancelled", "Workers", "Oldest due for", ...(operates ? ["Action"] : [])]}>
          ${data.items.map((item) => html`<${ItemRow} key=${item.name} item=${item} operates=${operates} show=${(queue) => this.row(queue)} />`)}<//></div>`
        : data ? html`<${Empty}>There is no queue: this process has no jobs.<//>` : null}</div>`;
  }

  row(queue) {
    const { counts } = queue;
    const count = (state) => (counts[state] ? html`<a href=${`#/jobs?${new URLSearchParams({ queue: queue.name, state })}`}>${counts[state]}</a>` : counts[state]);
    const alone = !queue.consumers && counts.waiting > 0;
    return html`<${Row}><${Head}>${queue.name}<//><${Cell} label="State"><${Word} of=${queue.paused ? "paused" : "running"} /><//>
      <${Cell} label="Waiting">${count("waiting")}<//><${Cell} label="Scheduled">${counts.scheduled}<//><${Cell} label="Running">${count("active")}<//>
      <${Cell} label="Failed">${count("failed")}<//><${Cell} label="Completed">${count("completed")}<//><${Cell} label="Cancelled">${count("cancelled")}<//>
      <${Cell} label="Workers">${queue.consumers}${alone ? html` <${Word} of="warn">no worker<//>` : ""}<//>
      <${Cell} label="Oldest due for">${queue.oldestDue ? span(queue.oldestDue) : "none"}<//>
      ${this.props.operates ? html`<${Cell} label="Action"><button type="button" aria-label=${`${queue.paused ? "Resume" : "Pause"} queue ${queue.name}`} onClick=${() => this.set(queue.name, queue.paused ? "resume" : "pause")}>${queue.paused ? "Resume" : "Pause"}</button><//>` : null}<//>`;
  }
}

export class SchedulesView extends Remote {
  constructor(props) {
    super(props);
    this.every = 15000;
  }

  path() {
    return address("schedules");
  }

  async set(task, action) {
    const reverse = action === "pause" ? "resume" : "pause";
    const words = { pause: "is paused: its times are skipped", resume: "runs again from its next time on" };
    await this.props.app.act(address("schedules", task, action), {}, () => `Schedule ${task} ${words[action]}.`, () => this.set(task, reverse));
    this.reload();
  }

  async run(task) {
    await this.props.app.act(address("schedules", task, "run"), {}, (job) => `Job ${job.id} of ${task} is ${job.state}; the times of the schedule stay.`);
    this.reload();
  }

  render({ operates }, { data, loading, error }) {
    return html`<div>${this.notice()}
      ${data && data.items.length
        ? html`<div class=${error ? "stale" : ""}><${Table} busy=${loading} caption="Schedules; times are UTC" columns=${["Task", "State", "Cron", "Time zone", "Last run", "Next run", "Runs after it", ...(operates ? ["Action"] : [])]}>
          ${data.items.map((item) => html`<${ItemRow} key=${item.task + item.cron} item=${item} operates=${operates} show=${(schedule) => this.row(schedule)} />`)}<//></div>`
        : data ? html`<${Empty}>No task has a schedule.<//>` : null}</div>`;
  }

  row(item) {
    const word = item.paused ? "Resume" : "Pause";
    return html`<${Row}><${Head}><a href=${`#/jobs?${new URLSearchParams({ task: item.task })}`}>${item.task}</a><//><${Cell} label="State"><${Word} of=${item.paused ? "paused" : "running"} /><//>
      <${Cell} label="Cron"><code>${item.cron}</code><//><${Cell} label="Time zone">${item.timezone}<//>
      <${Cell} label="Last run"><${Time} at=${item.lastRunAt} /><//><${Cell} label="Next run">${item.nextRunAt ? html`<${Time} at=${item.nextRunAt} />` : "unknown"}<//>
      <${Cell} label="Runs after it">${(item.nextRuns || []).slice(1, 4).map((at) => html`<span key=${at}><${Time} at=${at} /> </span>`)}<//>
      ${this.props.operates ? html`<${Cell} label="Action"><button type="button" aria-label=${`${word} schedule ${item.task}`} onClick=${() => this.set(item.task, word.toLowerCase())}>${word}</button>
      <button type="button" aria-label=${`Run schedule ${item.task} now`} onClick=${() => this.run(item.task)}>Run now</button><//>` : null}<//>`;
  }
}

/** Return when an open circuit lets a call pass; one that was opened by hand does not. */
const probeOf = ({ state, probeAt }, now) =>
  probeAt != null ? html`the first call after <${Time} at=${probeAt} now=${now} />` : state === "OPEN" ? "none: opened by hand" : "";

export class CircuitsView extends Pure {
  async set(name, action) {
    const words = { open: "is open: all calls are rejected until you close it", close: "is closed: calls pass" };
    // An open circuit that closes by itself is another state than one that was opened by hand.
    const undo = action === "open" ? () => this.set(name, "close") : null;
    await this.props.app.act(address("circuits", name, action), {}, () => `Circuit ${name} ${words[action]}.`, undo);
  }

  render({ part, operates, live }) {
    if (!part) return html`<p class="loading">Waiting for the first event …</p>`;
    return html`<div><p class="quiet">Circuits are of this process only; another process has its own.</p>
      ${part.length
        ? html`<${Table} caption="Circuits; times are UTC" columns=${["Circuit", "State", "Failures", "Next probe", "Since", "Rejected", ...(operates ? ["Action"] : [])]}>
          ${part.map((item) => html`<${ItemRow} key=${item.name} item=${item} operates=${operates} show=${(circuit) => html`<${Row}>
            <${Head}>${circuit.name}<//><${Cell} label="State"><${Word} of=${circuit.state} kind=${circuit.state === "OPEN" ? "bad" : undefined} /><//>
            <${Cell} label="Failures">${circuit.failureCount}<//><${Cell} label="Next probe">${probeOf(circuit, live.now())}<//>
            <${Cell} label="Since">${circuit.since ? html`<${Time} at=${circuit.since} now=${live.now()} />` : "the start"}<//><${Cell} label="Rejected">${circuit.rejected}<//>
            ${operates ? html`<${Cell} label="Action"><button type="button" aria-label=${`${circuit.state === "CLOSED" ? "Open" : "Close"} circuit ${circuit.name}`} onClick=${() => this.set(circuit.name, circuit.state === "CLOSED" ? "open" : "close")}>${circuit.state === "CLOSED" ? "Open" : "Close"}</button><//>` : null}<//>`} />`)}<//>`
        : html`<${Empty}>This process has no circuit breaker.<//>`}</div>`;
  }
}
CircuitsView.uses = "circuits";

export class LoggersView extends Remote {
  constructor(props) {
    super(props);
    this.every = 10000;
    this.state.minutes = "30";
  }

  path() {
    return address("loggers");
  }

  async set(name, level, before) {
    const minutes = this.state.minutes ? Number(this.state.minutes) : null;
    await this.props.app.act(
      address("loggers", name, "level"),
      { level, minutes: level ? minutes : null },
      (result) => `Logger ${name} writes ${result.effectiveLevel}${result.returnsAt ? `; the original level returns in ${minutes} min` : ""}.`,
      () => this.set(name, before, level),
    );
    this.reload();
  }

  choose(select, logger) {
    const level = select.value || null;
    // The level of the process is shown until the process has changed it.
    select.value = logger.level || "";
    this.set(logger.name, level, logger.level);
  }

  render({ app, query, operates }, { data, minutes }) {
    const items = data ? data.items.filter((item) => matches(query, item.name)) : [];
    return html`<div><${Find} app=${app} view="loggers" query=${query} label="Find a logger" />${this.notice()}
      <p class="quiet">Levels are of this process only.</p>
      ${operates ? html`<p><label>A change lasts <select value=${minutes} onChange=${(event) => this.setState({ minutes: event.target.value })}>
        <option value="30">30 min</option><option value="120">2 h</option><option value="">until the process ends</option></select></label></p>` : null}
      ${items.length
        ? html`<${Table} caption="Loggers" columns=${["Logger", "Level in force", "Own level", "Returns"]}>
          ${items.map((item) => html`<${ItemRow} key=${item.name} item=${item} minutes=${minutes} operates=${operates} show=${(logger) => html`<${Row}><${Head}>${logger.name}<//>
            <${Cell} label="Level in force">${logger.effectiveLevel}<//>
            <${Cell} label="Own level"><select disabled=${!operates} aria-label=${`Own level of ${logger.name}`} value=${logger.level || ""} onChange=${(event) => this.choose(event.target, logger)}>
                <option value="">original</option>${data.levels.map((level) => html`<option key=${level} value=${level}>${level}</option>`)}</select><//>
            <${Cell} label="Returns">${logger.returnsAt ? html`<${Time} at=${logger.returnsAt} />` : ""}<//><//>`} />`)}<//>`
        : data ? html`<${Empty}>No logger matches.<//>` : null}</div>`;
  }
}

export class SettingsView extends Remote {
  path() {
    return address("settings");
  }

  render({ app, query, active }, { data }) {
    const items = data ? data.items.filter((item) => matches(query, item.name, item.value, item.meaning)) : [];
    return html`<div><${Doctor} app=${app} active=${active} />
      <section aria-labelledby="settings"><h2 id="settings">Settings</h2>
      <${Find} app=${app} view="settings" query=${query} label="Find a setting" />${this.notice()}
      ${items.length
        ? html`<${Table} caption="Settings of this process; secrets are masked" columns=${["Variable", "Value", "Source", "Default", "Meaning"]}>
          ${items.map((item) => html`<${ItemRow} key=${item.name} item=${item} show=${settingRow} />`)}<//>`
        : data ? html`<${Empty}>No setting matches.<//>` : null}</section></div>`;
  }
}

const settingRow = (item) => html`<${Row}><${Head}><code>${item.name}</code><//><${Cell} label="Value">${item.value ? html`<code>${item.value}</code>` : "none"}<//>
  <${Cell} label="Source">${item.source === "default" ? "default" : html`<strong>${item.source}</strong>`}<//>
  <${Cell} label="Default">${item.default ?? "none"}<//><${Cell} label="Meaning">${item.meaning}<//><//>`;

const SEVERITY = { fail: 0, warn: 1, skip: 2, pass: 3 };

class Doctor extends Remote {
  path() {
    return address("settings", "doctor");
  }

  async run() {
    this.setState({ running: true });
    await this.props.app.act(address("settings", "doctor", "run"), {}, (result) => `The doctor has run: ${plural(result.findings.filter((each) => each.verdict === "fail").length, "failure")}.`);
    this.setState({ running: false });
    this.reload();
  }

  render(_, { data, running }) {
    const findings = data && data.findings ? [...data.findings].sort((one, other) => SEVERITY[one.verdict] - SEVERITY[other.verdict]) : [];
    const count = (verdict) => findings.filter((each) => each.verdict === verdict).length;
    return html`<section aria-labelledby="doctor"><h2 id="doctor">Doctor</h2>${this.notice()}
      ${data ? html`<p>${data.at ? html`${count("pass")} pass, ${plural(count("warn"), "warning")}, ${plural(count("fail"), "failure")}, at <${Time} at=${data.at} both=${true} />.` : "The doctor has not run since the start."}</p>` : null}
      <p><button type="button" disabled=${running} onClick=${() => this.run()}>Run the doctor</button></p>
      ${findings.length ? html`<${Table} caption="Findings of the doctor" columns=${["Area", "Verdict", "Found", "Remedy"]}>
        ${findings.map((item, index) => html`<${ItemRow} key=${`${index} ${item.area}`} item=${item} show=${findingRow} />`)}<//>` : null}</section>`;
  }
}

const findingRow = (item) => html`<${Row}><${Head}>${item.area}<//><${Cell} label="Verdict"><${Word} of=${item.verdict} /><//>
  <${Cell} label="Found">${item.found}<//><${Cell} label="Remedy">${item.remedy}<//><//>`;
