// The events of the audit trail: which caller did what, from where, and with which result.

import { address, query as encoded } from "./client.js";
import { Cell, Empty, Head, ItemRow, Remote, Row, Table, Time, Word, html } from "./parts.js";

const LIMIT = 100;
const KINDS = { done: "good", refused: "fair", failed: "bad" };

export class AuditView extends Remote {
  constructor(props) {
    super(props);
    this.every = 5000;
  }

  path() {
    const filter = Object.fromEntries(new URLSearchParams(this.props.query));
    return `${address("audit")}?${encoded({ ...filter, limit: LIMIT })}`;
  }

  render({ app, query }, { data, loading }) {
    const { before, ...filter } = Object.fromEntries(new URLSearchParams(query));
    const set = (name) => (event) => app.go("audit", encoded({ ...filter, [name]: event.target.value.trim() }));
    const select = (name, label, values) => html`<label>${label} <select value=${filter[name] || ""} onChange=${set(name)}>
      <option value="">all</option>${[...new Set([...values, filter[name]].filter(Boolean))].map(
        (value) => html`<option key=${value} value=${value}>${value}</option>`,
      )}</select></label>`;
    return html`<form class="filters" onSubmit=${(event) => event.preventDefault()}>
      <label>Actor <input type="search" value=${filter.actor || ""} onChange=${set("actor")} /></label>
      ${select("action", "Action", data ? data.actions : [])}
      ${select("outcome", "Outcome", Object.keys(KINDS))}</form>
      ${this.notice()}
      ${data ? html`<p class="quiet">${data.kept === "memory"
        ? "Kept in the memory of this process: its last 1000 events."
        : "Kept in Postgres, of all processes."}</p>` : null}
      ${data && data.items.length
        ? html`<${Table} busy=${loading} caption="Events, the latest first. Times are UTC." columns=${["At", "Actor", "Address", "Action", "Target", "Outcome", "Change", "Detail"]}>
          ${data.items.map((item) => html`<${ItemRow} key=${item.id} item=${item} show=${eventRow} />`)}<//>`
        : data ? html`<${Empty}>No event matches.<//>` : null}
      ${data ? html`<p class="tools">${before ? html`<a class="button" href=${`#/audit?${encoded(filter)}`}>Latest events</a> ` : null}
        ${data.nextCursor ? html`<a class="button" href=${`#/audit?${encoded({ ...filter, before: data.nextCursor })}`}>Older events</a>` : null}</p>` : null}`;
  }
}

function eventRow(item) {
  return html`<${Row}><${Head}><${Time} at=${item.at} /><//><${Cell} label="Actor">${item.actor}<//>
    <${Cell} label="Address">${item.address || ""}<//><${Cell} label="Action">${item.action}<//>
    <${Cell} label="Target">${item.target}<//><${Cell} label="Outcome"><${Word} of=${item.outcome} kind=${KINDS[item.outcome]} /><//>
    <${Cell} label="Change">${item.before ? `${item.before} → ` : ""}${item.after || ""}<//>
    <${Cell} label="Detail">${item.detail || ""}<//><//>`;
}
