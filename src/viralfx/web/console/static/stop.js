// The stop of this process: stages against their budgets, the deadline, the work in flight.

import { address } from "./client.js";
import {
  Bar,
  Cell,
  Component,
  Empty,
  Head,
  Row,
  Table,
  Time,
  Word,
  html,
  milliseconds,
  plural,
  span,
} from "./parts.js";

const seconds = (value) => `${(value / 1000).toFixed(1)}`;

export class StopView extends Component {
  async begin() {
    const { app, data } = this.props;
    const sure = await app.confirm({
      title: "Begin the stop of this process?",
      text: `It refuses readiness, drains its requests and jobs, and ends within its budgets. The stop cannot be called off. ${plural(data.inFlight ? data.inFlight.requests : 0, "request")} and ${plural(data.inFlight ? data.inFlight.jobCount : 0, "job")} are in flight.`,
      label: "Begin the stop",
      typed: data.instance,
      danger: true,
    });
    if (sure) {
      await app.act(address("stop", data.instance, "begin"), {}, () => "The stop has begun.");
    }
  }

  render({ live, data, administers }) {
    if (!data) return html`<p class="loading">Waiting for the first event …</p>`;
    const { stop } = data;
    const now = live.gone ? live.gone.at : live.fresh ? live.now() : live.since;
    const left = stop.deadline ? (Date.parse(stop.deadline) - now) / 1000 : null;
    const begun = !!stop.reason;
    return html`<div class=${live.fresh || live.gone ? "" : "stale"}>
      ${begun
        ? html`<p class="sentence"><${Word} of=${live.gone ? "ended" : stop.state} kind=${live.gone ? "idle" : "fair"} /> <strong>${stop.reason}</strong>.
            ${live.gone
              ? html` Gone at <${Time} at=${live.gone.at} both=${true} />.`
              : html` Forced end in <strong>${span(Math.max(0, Math.ceil(left)))}</strong> (<${Time} at=${stop.deadline} both=${true} />).`}</p>`
        : html`<p>This process is not stopping. These are the stages of a stop, with their budgets.</p>`}
      <${Table} caption="Stages of the stop, in their order" columns=${["Stage", "State", "Time of budget", "Parts"]}>
        ${stop.stages.map((stage) => html`<${Stage} key=${stage.name} stage=${stage} began=${live.began[stage.name]} now=${now} />`)}
      <//>
      <${InFlight} inFlight=${data.inFlight} now=${now} />
      <${Previous} previous=${stop.previous} />
      ${administers && !begun ? html`<p><button type="button" class="danger" onClick=${() => this.begin()}>Begin the stop …</button></p>` : null}
    </div>`;
  }
}
StopView.ticks = true;

function Stage({ stage, began, now }) {
  const runs = stage.state === "running" && began;
  const spent = runs ? Math.max(0, now - began) : stage.durationMs || 0;
  const text = stage.state === "pending" ? `of ${seconds(stage.budgetMs)} s` : `${seconds(spent)} of ${seconds(stage.budgetMs)} s`;
  return html`<${Row} class=${`stage ${stage.state}`}><${Head}>${stage.name}<//>
    <${Cell} label="State"><${Word} of=${stage.outcome || stage.state} kind=${stage.state === "running" ? "fair" : undefined} /><//>
    <${Cell} label="Time of budget"><${Bar} value=${spent} most=${stage.budgetMs} label=${text} /> ${text}<//>
    <${Cell} label="Parts"><ul class="parts">${stage.parts.map(
      (part) => html`<li key=${part.name}><${Word} of=${part.outcome || part.state} kind=${part.state === "running" ? "fair" : undefined}>${part.name}${
        part.state === "running" ? ": running" : part.outcome && part.outcome !== "ok" ? `: ${part.outcome}` : ""
      }<//> ${part.durationMs != null ? milliseconds(part.durationMs) : ""}</li>`,
    )}</ul><//><//>`;
}

function InFlight({ inFlight }) {
  if (!inFlight) return null;
  const { requests, jobs, jobCount } = inFlight;
  return html`<section aria-labelledby="flight"><h2 id="flight">In flight</h2>
    <p>${plural(requests, "request")} and ${plural(jobCount, "job")}.</p>
    ${jobs.length
      ? html`<${Table} caption=${jobCount > jobs.length ? `The first ${jobs.length} of ${jobCount} running jobs` : "Running jobs"} columns=${["Job", "Task", "Queue", "Attempt", "Time"]}>
        ${jobs.map((job) => html`<${Row} key=${job.id}><${Head}><a href=${`#/jobs/${encodeURIComponent(job.id)}`}>${job.id}</a><//>
          <${Cell} label="Task">${job.task}<//><${Cell} label="Queue">${job.queue}<//><${Cell} label="Attempt">${job.attempt}<//>
          <${Cell} label="Time">${span(job.seconds)} of ${span(job.timeout)}<//><//>`)}<//>`
      : null}</section>`;
}

function Previous({ previous }) {
  if (!previous) return null;
  const phases = Object.entries(previous.phases || {});
  return html`<section aria-labelledby="before"><h2 id="before">The process before</h2>
    <p>${previous.reason ? html`Stopped by <strong>${previous.reason}</strong>` : "Ended without a stop"}, state saved at <${Time} at=${previous.savedAt} both=${true} /> after ${span(previous.uptime)}.
    ${phases.length ? html` ${phases.map(([name, outcome]) => html`<span key=${name}>${name} <${Word} of=${outcome} />; </span>`)}` : ""}</p></section>`;
}
