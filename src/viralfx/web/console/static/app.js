// The page: address, session, stream, head, views, confirmation, result of the last action.

import { render } from "./vendor/preact.js";
import { Problem, SESSION, call, get, onUnauthorized, post } from "./client.js";
import { Live } from "./live.js";
import {
  Component,
  Dialog,
  Guard,
  LoadAgain,
  SIGNS,
  Trouble,
  Word,
  createRef,
  html,
  plural,
  span,
} from "./parts.js";
import { StatusView, ChangesView, sentence } from "./status.js";
import { session as firstSession } from "./start.js";

/** By name: title, file and class of the view, the rights that it needs, the view that it is part of. */
const VIEWS = {
  __proto__: null,
  status: ["Status", "status.js", "StatusView", "status"],
  stop: ["Stop", "stop.js", "StopView", "status"],
  fleet: ["Fleet", "fleet.js", "FleetView", "all"],
  jobs: ["Jobs", "jobs.js", "JobsView", "all"],
  queues: ["Queues", "process.js", "QueuesView", "all"],
  schedules: ["Schedules", "process.js", "SchedulesView", "all"],
  circuits: ["Circuits", "process.js", "CircuitsView", "status"],
  loggers: ["Loggers", "process.js", "LoggersView", "all"],
  settings: ["Settings", "process.js", "SettingsView", "settings"],
  audit: ["Audit", "audit.js", "AuditView", "all"],
  job: ["Job", "jobs.js", "JobView", "all", "jobs"],
  changes: ["Changes", "status.js", "ChangesView", "all", "fleet"],
  login: ["Log in", "", "", "none"],
};

const READS = ["none", "status", "all", "settings"];
const RIGHTS = ["none", "read", "operate", "admin"];

/** Return true if the viewer may read a view; a process of version 0.2 names no right, as a session has all. */
const mayRead = (session, needs) =>
  needs !== "none" && READS.indexOf(session.right || !session.loggedIn ? session.reads : "settings") >= READS.indexOf(needs);

/** Return true if the viewer has a right. */
const may = (session, right) =>
  RIGHTS.indexOf(session.right || (session.loggedIn ? "admin" : "none")) >= RIGHTS.indexOf(right);

const AGAIN_MS = 2000;
const FOLLOW_MS = 300;

/** The modules of the views by file. The first view needs one of them; the others follow it. */
class Modules {
  constructor(changed) {
    this.changed = changed;
    this.loaded = { "status.js": { StatusView, ChangesView } };
    this.errors = {};
    this.asked = new Set();
  }

  /** Load a file, and try again until it arrives. */
  async load(file, attempt = 0) {
    if (!file || this.loaded[file] || (!attempt && this.asked.has(file))) return;
    this.asked.add(file);
    try {
      // A browser keeps the failure of an address, so each attempt has its own.
      this.loaded[file] = await import(attempt ? `./${file}?attempt=${attempt}` : `./${file}`);
    } catch (error) {
      this.errors[file] = error;
      setTimeout(() => this.load(file, attempt + 1), Math.min(15, attempt + 1) * AGAIN_MS);
    }
    this.changed();
  }

  /** Load all, so that each view can be opened when the process has ended. */
  loadAll() {
    for (const [, file] of Object.values(VIEWS)) this.load(file);
  }
}

/** The view, the id of a job and the filters, from the part of the address after `#/`. */
function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/");
  const id = decoded(rest.join("/"));
  if (name === "jobs" && id) return { view: "job", id, query };
  return { view: VIEWS[name] && name !== "job" ? name : "status", id: "", query };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // It has a percent sign of its own.
  }
}

class App extends Component {
  constructor() {
    super();
    this.live = new Live(
      () => this.redraw(),
      (text) => this.announce(text),
      () => this.loadSession(),
    );
    this.modules = new Modules(() => this.redraw());
    this.first = firstSession;
    this.state = {
      session: null,
      trouble: null,
      ...route(),
      paused: false,
      dialog: null,
      toast: null,
      said: "",
      tick: 0,
    };
    this.heading = createRef();
    this.main = createRef();
  }

  componentDidMount() {
    addEventListener("hashchange", () => this.moved());
    document.addEventListener("visibilitychange", () => this.follow());
    onUnauthorized(() => this.expire());
    setInterval(() => this.tick(), 500);
    this.loadSession();
  }

  // -- the stream --------------------------------------------------------------------------

  tick() {
    if (document.hidden) return;
    this.live.watch();
    const { session } = this.state;
    if (session && session.expiresAt && Date.parse(session.expiresAt) <= this.live.now()) {
      this.expire();
    }
    // Times that grow are shown in seconds, so every other tick is enough.
    this.odd = !this.odd;
    if (this.odd) this.setState({ tick: this.state.tick + 1 });
  }

  redraw() {
    // Later than the first view, so that it does not wait for the files of the others.
    if (this.live.data && !this.following) {
      this.following = setTimeout(() => this.modules.loadAll(), FOLLOW_MS);
    }
    this.setState({ tick: this.state.tick + 1 });
  }

  /** Open the stream while the page is shown, and close it otherwise: a browser has six. */
  follow() {
    const { session, paused } = this.state;
    const denied = session && session.reads === "none";
    const shown = !document.hidden && !paused && session && !denied;
    if (shown && !this.live.wanted) session.full ? this.live.ask() : this.live.open();
    else if (!shown) this.live.close(denied ? "denied" : "off");
    this.redraw();
  }

  announce(text) {
    this.setState({ said: text });
  }

  // -- the session -------------------------------------------------------------------------

  async loadSession() {
    try {
      const { first } = this;
      this.first = null; // Once: an answer that cannot be shown must not come back.
      const session = (await first) || (await get(SESSION));
      if (session.start) this.live.begin(session.start, session.at);
      this.version = this.version || session.version;
      this.setState({ session, trouble: null }, () => this.follow());
    } catch (trouble) {
      this.setState({ trouble });
      setTimeout(() => this.loadSession(), 2000);
    }
  }

  async expire() {
    if (this.expiring || !this.state.session || !this.state.session.loggedIn) return;
    this.expiring = true;
    this.setState({ session: { ...this.state.session, loggedIn: false, expiresAt: null, name: null, right: "none" } });
    this.tell("The session has ended. Log in again.", "fair");
    this.restart();
    await this.loadSession();
    this.expiring = false;
  }

  /** Let the stream begin anew: with a session it has more data than without one. */
  restart() {
    this.live.close();
    this.live.lastId = "";
  }

  async logIn(token) {
    await call("POST", SESSION, { token });
    this.restart();
    await this.loadSession();
    if (this.state.view === "login") this.go("status");
    this.tell("You are logged in.", "good");
  }

  async logOut() {
    try {
      await call("DELETE", SESSION);
    } catch (error) {
      this.tell(error.message, "bad");
      return;
    }
    this.restart();
    this.live.data = null;
    await this.loadSession();
    this.tell("You are logged out.", "good");
  }

  // -- the address -------------------------------------------------------------------------

  go(view, query = "", { replace = false } = {}) {
    const hash = `#/${view}${query ? `?${query}` : ""}`;
    if (replace) {
      history.replaceState(null, "", hash);
      this.setState(route());
    } else {
      location.hash = hash;
    }
  }

  moved() {
    const next = route();
    const turned = next.view !== this.state.view || next.id !== this.state.id;
    this.setState({ ...next, toast: turned ? null : this.state.toast }, () => {
      if (turned && this.heading.current) this.heading.current.focus();
    });
  }

  // -- actions -----------------------------------------------------------------------------

  tell(text, kind = "good", undo = null) {
    this.setState({ toast: { text, kind, undo }, said: text });
  }

  /** Ask for a confirmation; the promise is true or false. `typed` must be typed in first. */
  confirm(question) {
    const from = document.activeElement;
    return new Promise((resolve) => {
      const done = (answer) => {
        this.setState({ dialog: null }, () => from && from.isConnected && from.focus());
        resolve(answer);
      };
      this.setState({ dialog: { ...question, done } });
    });
  }

  /**
   * Send an action and show its result. `done(result)` returns the sentence; `undo` is an action
   * that reverses it. Returns the result, or the Problem.
   */
  async act(path, body, done, undo = null) {
    try {
      const result = await post(path, body);
      this.tell(done(result), "good", undo);
      return result;
    } catch (error) {
      const known = error instanceof Problem;
      if (!known) console.error(error);
      const text = known ? error.message : `The page cannot show the result: ${error.message}. Load it again.`;
      if (error.status !== 401) this.tell(text, "bad");
      return error;
    }
  }

  // -- the page ----------------------------------------------------------------------------

  static getDerivedStateFromError(error) {
    return { failed: error };
  }

  componentDidCatch(error) {
    console.error(error);
  }

  render(_, state) {
    try {
      if (!state.failed) return this.page(state);
    } catch (error) {
      // The page of one version may not know the data of another one.
      if (!this.caught) console.error(error);
      this.caught = error;
    }
    const { message } = state.failed || this.caught;
    return html`<main id="main"><h1>Operations console</h1>
      <p class="notice bad" role="status">Disconnected: this page has failed (${message}). Load it again.</p>
      <p><${LoadAgain} /></p></main>`;
  }

  page(state) {
    const { session, view, id, query, dialog, toast } = state;
    if (!session) return this.waiting();
    const shown = view === "login" && session.loggedIn ? "status" : view;
    const [title, file, name, needs] = VIEWS[shown];
    const { live, modules } = this;
    modules.load(file);
    const View = file && modules.loaded[file] ? modules.loaded[file][name] : null;
    document.title = this.titleOf(title);
    const denied = !mayRead(session, needs);
    const away = live.phase === "lost" || live.phase === "gone";
    const active = !document.hidden && !state.paused && !away;
    const props = {
      app: this,
      live,
      data: live.data,
      id,
      query,
      active,
      operates: may(session, "operate"),
      administers: may(session, "admin"),
      session,
      ...(View && View.ticks ? { tick: state.tick } : {}),
    };
    if (View && !View.ticks) {
      delete props.data;
      if (View.uses) props.part = live.data && live.data[View.uses];
    }
    return html`
      <a class="skip" href="#main" onClick=${(event) => this.skip(event)}>Skip to the content</a>
      ${this.head(session)}
      ${this.nav(shown, session)}
      <main id="main" tabindex="-1" ref=${this.main}>
        ${this.moment()}
        <p aria-live="polite" class="unseen">${state.said}</p>
        ${toast ? html`<${Toast} toast=${toast} close=${() => this.setState({ toast: null })} />` : null}
        <h1 tabindex="-1" ref=${this.heading}>${title}</h1>
        ${denied && session.name && shown !== "login"
          ? html`<p class="empty">${session.name} has not the right ${needs === "settings" ? "admin" : "read"}, which this view needs.</p>`
          : denied
          ? html`<${LogIn} key=${shown} app=${this} session=${session} title=${title} />`
          : View
            ? html`<${Guard} key=${shown}><${View} ...${props} /><//>`
            : modules.errors[file]
              ? html`<${Trouble} error=${modules.errors[file]} page=${true} />`
              : html`<p class="loading">Loading …</p>`}
      </main>
      ${dialog ? html`<${Dialog} ...${dialog} />` : null}`;
  }

  titleOf(title) {
    const { data, phase } = this.live;
    if (!data) return `${title} · Operations console`;
    const state = this.live.fresh ? data.state.state.replaceAll("_", " ") : phase;
    return `${state} · ${title} · ${data.instance}`;
  }

  waiting() {
    const { trouble } = this.state;
    return html`<main id="main"><h1>Operations console</h1>
      <p role="status">Disconnected. ${trouble ? `${trouble.message} The page tries again every 2 s.` : "The page loads."}</p>
      ${trouble ? html`<p><${LoadAgain} /></p>` : null}</main>`;
  }

  skip(event) {
    event.preventDefault();
    this.main.current.focus();
  }

  head(session) {
    const { live } = this;
    const data = live.data || session;
    const state = live.data ? live.data.state.state : "unknown";
    const up = live.data && live.fresh ? ` · up ${span((live.now() - live.upAt) / 1000)}` : "";
    return html`<header>
      <p class="instance"><strong>${data.instance}</strong>
        <span>${live.data ? `${live.data.role} · ` : ""}${data.version} · ${data.environment}${up}</span></p>
      <p class="now">${live.fresh
        ? html`<${Word} of=${state} /> <span class="quiet">${live.phase === "full" ? "asked" : "last event"} ${span(Math.floor(live.silence()))} ago</span>`
        : html`<${Word} of=${live.phase} kind=${live.phase === "connecting" || live.phase === "off" ? "idle" : "bad"}>${PHASES[live.phase]}<//>
           ${live.data ? html`<span class="quiet">last state ${state.replaceAll("_", " ")}</span>` : null}`}</p>
      <p class="tools">
        <button type="button" aria-pressed=${this.state.paused ? "true" : "false"} onClick=${() =>
          this.setState({ paused: !this.state.paused }, () => this.follow())}>Pause updates</button>
        ${session.name ? html`<span class="quiet">${session.name}: ${session.right}</span>` : null}
        ${session.loggedIn
          ? html`<button type="button" onClick=${() => this.logOut()}>Log out</button>`
          : session.login
            ? html`<a class="button" href="#/login">Log in</a>`
            : null}
      </p>
    </header>`;
  }

  nav(shown, session) {
    const current = VIEWS[shown][4] || shown;
    return html`<nav aria-label="Views"><ul>${Object.entries(VIEWS)
      .filter(([, [, , , needs, parent]]) => parent == null && needs !== "none" && (!session.name || mayRead(session, needs)))
      .map(
        ([name, [title]]) => html`<li key=${name}><a href=${`#/${name}`} aria-current=${
          name === current ? (name === shown ? "page" : "true") : null
        }>${title}</a></li>`,
      )}</ul></nav>`;
  }

  sentence() {
    const { trouble, paused } = this.state;
    if (trouble) return { kind: "bad", text: `Disconnected: ${trouble.message} The page tries again every 2 s.` };
    try {
      return sentence(this.live, paused);
    } catch {
      // A page of another version than the process, which is newer after a deployment.
      return { kind: "bad", text: "Disconnected: this page cannot show the data of the process. Load it again." };
    }
  }

  /** The sentence of the moment on top of each view, and the line below it. */
  moment() {
    const { live, state } = this;
    const { data, phase } = live;
    const { kind, text } = this.sentence();
    const stopping = data && data.stop && data.stop.reason;
    const link = state.view === "stop" ? null : html` <a href="#/stop">${phase === "gone" ? "Its stop" : "Watch the stop"}</a>`;
    const more = [];
    if (phase === "gone" && live.gone) {
      more.push(`The page connects to the next process on this port.${live.gone.left.length ? ` Still to close then: ${live.gone.left.join(", ")}.` : ""}`, link);
    } else if (live.fresh && stopping && link) {
      const left = data.stop.deadline ? (Date.parse(data.stop.deadline) - live.now()) / 1000 : 0;
      more.push(`Forced end in ${span(Math.max(0, Math.ceil(left)))}.`, link);
    }
    if (phase === "full") {
      more.push(live.crowded || state.session.full
        ? "This process has too many streams open: the page asks every 5 s."
        : "No stream of events reaches this page, as through a proxy that refuses it: the page asks every second.");
    }
    if (phase === "failed") more.push(html`<${LoadAgain} />`);
    if (data && data.version !== this.version) {
      more.push(`This page is of version ${this.version}, and the process of ${data.version}. `, html`<${LoadAgain} />`);
    }
    return html`<div class=${`notice moment ${kind}`}>
      <p class="sentence"><span class=${`word ${kind}`} aria-hidden="true">${SIGNS[kind]}</span> <strong role="status">${text}</strong></p>
      ${more.length ? html`<p>${more}</p>` : null}</div>`;
  }
}

const PHASES = {
  connecting: "connecting",
  silent: "no events",
  lost: "no answer",
  gone: "ended",
  failed: "not readable",
  off: "not connected",
  denied: "not allowed",
};

function Toast({ toast, close }) {
  const undo = async () => {
    close();
    await toast.undo();
  };
  return html`<p class=${`notice toast ${toast.kind}`}><${Word} of=${toast.kind} kind=${toast.kind}>${toast.text}<//>
    <span class="tools">${toast.undo ? html`<button type="button" onClick=${undo}>Undo</button>` : null}
    <button type="button" onClick=${close}>Dismiss</button></span></p>`;
}

class LogIn extends Component {
  constructor(props) {
    super(props);
    this.state = { error: null, busy: false };
    this.field = createRef();
  }

  componentDidMount() {
    if (this.field.current) this.field.current.focus();
  }

  async submit(event) {
    event.preventDefault();
    const token = this.field.current.value.trim();
    if (!token || this.state.busy) return;
    this.setState({ busy: true, error: null });
    try {
      await this.props.app.logIn(token);
      return;
    } catch (error) {
      const wait = error.retryAfter ? ` Wait ${plural(error.retryAfter, "second")}.` : "";
      this.setState({ busy: false, error: `${error.message}${wait}` });
    }
    this.field.current.value = "";
    this.field.current.focus();
  }

  render({ session, title }, { error, busy }) {
    if (!session.login) {
      return html`<p class="empty">This view needs a log-in, and this process has no token: set MANAGEMENT_TOKEN and start it again.</p>`;
    }
    return html`<form class="login" onSubmit=${(event) => this.submit(event)}>
      ${title === "Log in" ? null : html`<p>This view needs a log-in.</p>`}
      <input type="text" autocomplete="username" value="operations console" hidden readonly />
      <p><label for="token">Token</label>
      <input id="token" type="password" autocomplete="current-password" required ref=${this.field} aria-describedby="token-help" aria-invalid=${error ? "true" : "false"} /></p>
      <p id="token-help" class="quiet">The value of MANAGEMENT_TOKEN, or a token of TOKENS with the right read. The page exchanges the token for a cookie of 8 hours and does not keep it.</p>
      ${error ? html`<p class="notice bad" role="alert"><${Word} of="error" kind="bad" /> ${error}</p>` : null}
      <p><button type="submit" class="main" disabled=${busy}>Log in</button></p>
    </form>`;
  }
}

render(html`<${App} />`, document.getElementById("app"));
