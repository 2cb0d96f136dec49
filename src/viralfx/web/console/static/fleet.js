// All processes that report to the same database, and the ones that no longer do.

import { address } from "./client.js";
import { Cell, Empty, Head, ItemRow, Remote, Row, Table, Time, Word, html, plural, span } from "./parts.js";

const FILTERS = ["role", "version", "state"];

export class FleetView extends Remote {
  constructor(props) {
    super(props);
    this.every = 2000;
  }

  path() {
    return address("fleet");
  }

  render({ app, query }, { data }) {
    if (!data) return html`<div>${this.notice()}</div>`;
    const filter = Object.fromEntries(new URLSearchParams(query));
    const items = data.items.filter((item) => FILTERS.every((key) => !filter[key] || item[key] === filter[key]));
    const set = (key) => (event) => {
      const next = { ...filter, [key]: event.target.value };
      app.go("fleet", new URLSearchParams(Object.entries(next).filter(([, value]) => value)).toString());
    };
    const running = data.items.filter((item) => item.state !== "stopped");
    const silent = running.filter((item) => item.state === "silent").length;
    const versions = new Set(running.map((item) => item.version)).size;
    return html`<div>${this.notice()}
      <p class="sentence"><${Word} of="summary" kind=${silent ? "bad" : "good"}>${plural(running.length, "instance")} · ${plural(versions, "version")} · ${silent} silent<//></p>
      <p class="quiet">${data.kept === "memory"
        ? "Without a database, this list has this process only."
        : `Each process reports every ${data.beat} s. One that has lost its connection to the database, or has sent no report for ${data.silentAfter} s, is silent: its last state may be wrong by now.`}</p>
      <form class="filters" onSubmit=${(event) => event.preventDefault()}>${FILTERS.map((key) => {
        const values = [...new Set([...data.items.map((item) => item[key]), filter[key]].filter(Boolean))].sort();
        return html`<label key=${key}>${key[0].toUpperCase() + key.slice(1)} <select value=${filter[key] || ""} onChange=${set(key)}>
          <option value="">all</option>${values.map((value) => html`<option key=${value} value=${value}>${value}</option>`)}</select></label>`;
      })}</form>
      ${items.length
        ? html`<${Table} caption="Instances; times are UTC" columns=${["Instance", "Role", "Version", "State", "Last report", "Up", "Health", "Jobs"]}>
          ${items.map((item) => html`<${ItemRow} key=${item.instance} item=${item} show=${instanceRow} />`)}<//>`
        : html`<${Empty}>No instance matches.<//>`}
      ${data.more ? html`<p class="quiet">${plural(data.more, "more process", "more processes")} ended earlier.</p>` : null}</div>`;
  }
}

function instanceRow(item) {
  const trouble = Object.entries(item.checks || {}).filter(([, status]) => status !== "pass");
  const silent = item.state === "silent";
  const up = (Date.parse(item.seenAt) - Date.parse(item.startedAt)) / 1000;
  return html`<${Row} class=${item.state}><${Head}><a href=${`#/changes?${new URLSearchParams({ instance: item.instance })}`}>${item.instance}</a>${item.self ? " (this process)" : ""}<//>
    <${Cell} label="Role">${item.role}<//><${Cell} label="Version">${item.version}<//>
    <${Cell} label="State"><${Word} of=${item.state} />${silent ? html` <span class="quiet">last state ${String(item.lastState).replaceAll("_", " ")}</span>` : ""}<//>
    <${Cell} label="Last report"><${Time} at=${item.seenAt} /> <span class="quiet">${span(item.age)} ago</span><//>
    <${Cell} label="Up">${span(up)}<//>
    <${Cell} label="Health">${silent ? html`<span class="quiet">before: </span>` : ""}<${Word} of=${item.health} kind=${silent ? "idle" : undefined} /> ${trouble.map(([name, status]) => html`<span key=${name}>${name} <${Word} of=${status} kind=${silent ? "idle" : undefined} /> </span>`)}<//>
    <${Cell} label="Jobs">${item.jobs ? `${item.jobs} held` : item.queues && item.queues.length ? "0" : ""}${item.queues && item.queues.length ? html` <span class="quiet">${item.queues.join(", ")}</span>` : ""}<//><//>`;
}
