// Jobs by filter, with actions on one job and on all that match; one job with its attempts.

import { address, get, query as encoded } from "./client.js";
import { Cell, Empty, Head, ItemRow, Remote, Row, Table, Text, Time, Word, html, plural, span } from "./parts.js";

const STATES = ["waiting", "active", "completed", "failed", "cancelled"];
const FIELDS = ["state", "queue", "task", "code", "correlationId", "since", "before"];
const LIMIT = 100;
const RETRIED = ["failed", "cancelled"];
const CANCELLED = ["waiting", "active"];
const DONE = { retry: "waiting again", run: "due now" };

const filterOf = (query) => {
  const given = new URLSearchParams(query);
  return Object.fromEntries(FIELDS.map((name) => [name, given.get(name) || ""]).filter(([, value]) => value));
};

/** Return the minute an hour or a day ago, so that the address of a view stays the same. */
const ago = (now, hours) => new Date(Math.floor(now / 60000) * 60000 - hours * 3600000).toISOString();

function inWords(filter) {
  const { since, ...rest } = filter;
  const words = Object.entries(rest).map(([name, value]) => `${name} ${value}`);
  return [...words, ...(since ? [`since ${since.slice(0, 16).replace("T", " ")} UTC`] : [])].join(", ") || "no filter";
}

export class JobsView extends Remote {
  constructor(props) {
    super(props);
    this.every = 5000;
  }

  path() {
    return `${address("jobs")}?${encoded({ ...filterOf(this.props.query), limit: LIMIT })}`;
  }

  set(changes) {
    const { before, ...filter } = filterOf(this.props.query);
    this.props.app.go("jobs", encoded({ ...filter, ...changes }));
  }

  async change(id, action) {
    const { app } = this.props;
    if (action === "cancel") {
      const sure = await app.confirm({
        title: "Cancel this job?",
        text: `Job ${id} ends without a result. A running task is cancelled. You can retry the job later.`,
        label: "Cancel the job",
        danger: true,
      });
      if (!sure) return;
    }
    await app.act(address("jobs", id, action), {}, (job) => `Job ${id} is ${DONE[action] || (job.state === "active" ? "being cancelled" : job.state)}.`);
    this.reload();
  }

  /** Show how many jobs match now, and change them only if the number is still the same. */
  async changeAll(action) {
    const { app } = this.props;
    const { before, correlationId, ...filter } = filterOf(this.props.query);
    const word = action === "retry" ? "Retry" : "Cancel";
    let count;
    let least = "";
    try {
      const found = await get(`${address("jobs", "all")}?${encoded({ action, ...filter })}`, 20000);
      count = found.count;
      least = found.atLeast ? "at least " : "";
    } catch (error) {
      app.tell(error.message, "bad");
      return;
    }
    let grown = "";
    while (count) {
      const sure = await app.confirm({
        title: `${word} ${least}${plural(count, "job")}?`,
        text: `${grown}The filter is: ${inWords(filter)}. ${action === "retry" ? "Each job gets all its attempts again. This cannot be undone." : "The jobs end without a result. You can retry them later."}`,
        label: `${word} ${least}${plural(count, "job")}`,
        danger: action === "cancel",
      });
      if (!sure) return;
      const result = await app.act(address("jobs", "all", action), { filter, count }, (done) => `${plural(done.count, "job")} ${action === "retry" ? (done.count === 1 ? "waits again" : "wait again") : "cancelled"}.`);
      if (result.code !== "count") break;
      const now = (result.errors[0] || {}).count;
      if (!now) break;
      grown = `The number has changed from ${count} to ${now}. `;
      count = now;
    }
    if (!count) app.tell("No job matches.", "fair");
    this.reload();
  }

  render({ app, live, query, part, operates }, { data, loading, error }) {
    const filter = filterOf(query);
    const queues = part ? part.items.map((queue) => queue.name) : [];
    const names = [...new Set([...queues, filter.queue].filter(Boolean))];
    const on = (name) => (event) => this.set({ [name]: event.target.value.trim() });
    const narrowed = ["state", "queue", "task", "code", "since"].some((name) => filter[name]);
    const bulk = operates && narrowed && !filter.before && !filter.correlationId && data && data.items.length > 0;
    const state = filter.state;
    return html`<div>
      <p class="chips" role="group" aria-label="Frequent filters">
        <button type="button" onClick=${() => this.set({ state: "failed", since: ago(live.now(), 1) })}>Failed in the last hour</button>
        <button type="button" onClick=${() => this.set({ since: ago(live.now(), 1) })}>Last hour</button>
        <button type="button" onClick=${() => this.set({ since: ago(live.now(), 24) })}>Last day</button>
        <button type="button" onClick=${() => app.go("jobs")}>No filter</button></p>
      <form class="filters" onSubmit=${(event) => event.preventDefault()}>
        <label>State <select value=${state || ""} onChange=${on("state")}><option value="">all</option>${STATES.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}</select></label>
        <label>Queue <select value=${filter.queue || ""} onChange=${on("queue")}><option value="">all</option>${names.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}</select></label>
        <label>Task <input type="search" value=${filter.task || ""} onChange=${on("task")} /></label>
        <label>Error code <input type="search" value=${filter.code || ""} onChange=${on("code")} /></label>
        <label>Correlation id <input type="search" value=${filter.correlationId || ""} onChange=${on("correlationId")} /></label>
        ${filter.since ? html`<span class="quiet">since <${Time} at=${filter.since} both=${true} /> <button type="button" onClick=${() => this.set({ since: "" })}>Any time</button></span>` : null}
      </form>
      ${this.notice()}
      ${bulk && (!state || state === "failed") ? html`<p><button type="button" class="main" onClick=${() => this.changeAll("retry")}>Retry all that match …</button></p>` : null}
      ${bulk && (!state || CANCELLED.includes(state)) ? html`<p><button type="button" onClick=${() => this.changeAll("cancel")}>Cancel all that match …</button></p>` : null}
      ${data && data.items.length
        ? html`<div class=${error ? "stale" : ""}><${Table} busy=${loading} caption=${`Jobs, the newest first: ${inWords(filter)}. Times are UTC.`} columns=${["Job", "Task", "State", "Attempts", "Accepted", "Last error", ...(operates ? ["Action"] : [])]}>
          ${data.items.map((item) => html`<${ItemRow} key=${item.id} item=${item} operates=${operates} show=${(job) => this.row(job)} />`)}<//></div>`
        : data && !error ? html`<${Empty}>No job matches this filter${data.nextCursor ? " among those searched so far" : ""}.<//>` : null}
      ${data ? html`<p class="tools">${filter.before ? html`<a class="button" href=${`#/jobs?${encoded({ ...filter, before: "" })}`}>Newest</a>` : null}
        ${data.nextCursor ? html`<a class="button" href=${`#/jobs?${encoded({ ...filter, before: data.nextCursor })}`}>${data.items.length < LIMIT ? "Search further back" : "Older jobs"}</a>` : null}</p>` : null}
    </div>`;
  }

  row(job) {
    const text = job.error ? job.error.message : job.progress ? job.progress.message || "" : "";
    return html`<${Row} class=${job.state}><${Head}><a href=${`#/jobs/${encodeURIComponent(job.id)}`} title=${job.id}><span class="id">${job.id.slice(0, 8)}…${job.id.slice(-4)}</span></a><//>
      <${Cell} label="Task"><a href=${`#/jobs?${encoded({ ...filterOf(this.props.query), before: "", task: job.task })}`}>${job.task}</a> <span class="quiet">${job.queue}</span><//>
      <${Cell} label="State"><${Word} of=${job.state} />${job.cancelRequested ? " cancel requested" : ""}<//>
      <${Cell} label="Attempts">${job.attempts}<//>
      <${Cell} label="Accepted"><${Time} at=${job.createdAt} /><//>
      <${Cell} label="Last error">${job.error ? html`<code>${job.error.code}</code> ` : ""}${String(text || "").slice(0, 160)}<//>
      ${this.props.operates ? html`<${Cell} label="Action"><${JobButtons} job=${job} now=${this.props.live.now()} change=${(id, action) => this.change(id, action)} /><//>` : null}<//>`;
  }
}
JobsView.uses = "queues";

function JobButtons({ job, now, change }) {
  const name = `job ${job.id}`;
  return [
    RETRIED.includes(job.state) ? html`<button type="button" key="retry" aria-label=${`Retry ${name}`} onClick=${() => change(job.id, "retry")}>Retry</button>` : null,
    job.state === "waiting" && Date.parse(job.runAt) > now ? html`<button type="button" key="run" aria-label=${`Run ${name} now`} onClick=${() => change(job.id, "run")}>Run now</button>` : null,
    CANCELLED.includes(job.state) && !job.cancelRequested ? html`<button type="button" key="cancel" aria-label=${`Cancel ${name}`} onClick=${() => change(job.id, "cancel")}>Cancel</button>` : null,
  ];
}

export class JobView extends Remote {
  constructor(props) {
    super(props);
    this.every = 2000;
  }

  path() {
    return address("jobs", this.props.id);
  }

  change(id, action) {
    return JobsView.prototype.change.call(this, id, action);
  }

  render({ live, operates }, { data, error }) {
    if (!data) {
      return html`<div>${error && error.status === 404 ? html`<${Empty}>There is no such job: it was never accepted, or it has been pruned.<//>` : this.notice()}
        <p><a href="#/jobs">All jobs</a></p></div>`;
    }
    const facts = [
      ["Task", html`<a href=${`#/jobs?${encoded({ task: data.task })}`}>${data.task}</a>`],
      ["Queue", html`<a href=${`#/jobs?${encoded({ queue: data.queue })}`}>${data.queue}</a>`],
      ["State", html`<${Word} of=${data.state} />${data.cancelRequested ? " cancel requested" : ""}`],
      ["Attempts", `${data.attempts}${data.crashes ? `, and ${plural(data.crashes, "crash", "crashes")}` : ""}`],
      ["Accepted", html`<${Time} at=${data.createdAt} both=${true} />`],
      ["Due", html`<${Time} at=${data.runAt} both=${true} />`],
      ["Started", html`<${Time} at=${data.startedAt} both=${true} />`],
      ["Finished", html`<${Time} at=${data.finishedAt} both=${true} />`],
      ["Worker", data.worker],
      ["Priority", data.priority || ""],
      ["Correlation id", data.correlationId ? html`<a href=${`#/jobs?${encoded({ correlationId: data.correlationId })}`}>${data.correlationId}</a>` : ""],
      ["Idempotency key", data.keyOwner ? `${data.idempotencyKey} (of ${data.keyOwner})` : data.idempotencyKey],
      ["User", data.userId],
      ["Progress", data.progress ? [data.progress.message, data.progress.total ? `${data.progress.current} of ${data.progress.total}` : data.progress.current].filter((each) => each != null).join(", ") : ""],
      ["Last error", data.error ? html`<code>${data.error.code}</code> ${data.error.message}` : ""],
    ].filter(([, value]) => value != null && value !== "");
    return html`<div class=${error ? "stale" : ""}>
      ${this.notice()}
      <p><code>${data.id}</code></p>
      ${operates ? html`<p class="tools"><${JobButtons} job=${data} now=${live.now()} change=${(id, action) => this.change(id, action)} /></p>` : null}
      <dl>${facts.map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
      <section aria-labelledby="attempts"><h2 id="attempts">Executions that failed</h2>
      ${data.failures.length
        ? html`<ol class="attempts">${data.failures.map((failure) => html`<li key=${failure.number}>
          <p><strong>#${failure.number}</strong> <${Time} at=${failure.startedAt || failure.endedAt} /> ${failure.startedAt ? span((Date.parse(failure.endedAt) - Date.parse(failure.startedAt)) / 1000) : ""} <code>${failure.code}</code> ${failure.message} <span class="quiet">${failure.worker || ""}</span></p>
          ${failure.traceback ? html`<details><summary>Traceback of execution ${failure.number}</summary><${Text}>${failure.traceback}<//></details>` : null}</li>`)}</ol>`
        : html`<${Empty}>No execution of this job has failed.<//>`}</section>
      <section aria-labelledby="payload"><h2 id="payload">Payload and result</h2>
      ${data.payloadHidden ? html`<p class="empty">Payload (${plural(data.payloadBytes, "byte")}) and result (${plural(data.resultBytes || 0, "byte")}) are hidden.</p>` : null}
      ${data.payload != null ? html`<h3>Payload</h3><${Text}>${data.payload}<//>` : null}
      ${data.result != null ? html`<h3>Result</h3><${Text}>${data.result}<//>` : null}
      ${data.cut ? html`<p class="quiet">The text is cut. The jobs API has all ${plural(Math.max(data.payloadBytes || 0, data.resultBytes || 0), "byte")}.</p>` : null}</section>
    </div>`;
  }
}
