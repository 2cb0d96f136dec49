// The events of the process: one stream, its consequences, and those of its silence.

import { Problem, SESSION, get } from "./client.js";

const SILENT_AFTER_MS = 5000;
const REOPEN_AFTER_MS = 20000;
const ASK_MS = 5000; // For a page without a stream.
const AGAIN_MS = 1000;
const LATER_MS = 10000; // After data that this page cannot read, as they may come again.
const MAX_CHANGES = 200;

/**
 * `phase` is one of:
 * connecting  no event has arrived yet
 * live        events arrive
 * silent      the connection is open, and beats are missing
 * lost        there is no connection
 * gone        the process said that it ends, and ended
 * full        the process has too many streams open: the page asks instead
 * failed      this page cannot read the data of the process, such as those of another version
 * off         this page closed its stream: hidden or paused
 * denied      reading needs a token
 */
export class Live {
  constructor(changed, announce, denied) {
    this.denied = denied;
    this.changed = changed;
    this.announce = announce;
    this.data = null;
    this.phase = "off";
    this.since = Date.now();
    this.offset = 0; // The clock of the server minus the clock of the browser.
    this.lastEvent = 0;
    this.eventAt = 0; // The same by the clock of the server.
    this.begunAt = 0; // When the snapshot that came with the session arrived.
    this.lastId = "";
    this.gone = null;
    this.refused = ""; // The error with which the process answers in place of the state.
    this.crowded = false; // Whether the process said that it has too many streams.
    this.began = {}; // When each stage of the stop was first seen running.
    this.source = null;
    this.wanted = false;
    this.timer = 0;
  }

  now() {
    return Date.now() + this.offset;
  }

  /** Seconds since the last event. */
  silence() {
    const last = this.lastEvent || this.begunAt;
    return last ? (performance.now() - last) / 1000 : 0;
  }

  get fresh() {
    return this.phase === "live" || this.phase === "full";
  }

  /** Begin with a snapshot that came with the session: the stream goes on from its id. */
  begin(start, at) {
    this.take(start, at);
    this.enter(performance.now() - at < SILENT_AFTER_MS ? "live" : "connecting");
  }

  /** Take the snapshot of an answer that arrived at `at`. */
  take({ id, snapshot }, at) {
    const age = performance.now() - at;
    this.replace(snapshot);
    this.lastId = id;
    this.begunAt = at;
    this.offset = Date.parse(snapshot.now) - (Date.now() - age);
    this.eventAt = Date.parse(snapshot.now);
  }

  open({ again = false } = {}) {
    this.wanted = true;
    clearTimeout(this.timer);
    if (this.source) return;
    if (!again && ["connecting", "off", "denied"].includes(this.phase)) this.enter("connecting");
    this.opened = performance.now();
    let answered = false;
    const last = this.lastId ? `?last=${encodeURIComponent(this.lastId)}` : "";
    const source = new EventSource(`events${last}`);
    this.source = source;
    source.onopen = () => {
      answered = true;
      this.refused = "";
    };
    const kinds = ["snapshot", "checks", "change", "state", "stop", "circuit", "queues", "beat", "bye"];
    for (const kind of kinds) {
      source.addEventListener(kind, (event) => {
        if (source === this.source) this.receive(kind, event);
      });
    }
    source.onerror = () => {
      if (source !== this.source) return;
      this.shut();
      const lasted = performance.now() - this.opened;
      // A stream may end without a fault, as under a server that waits for its streams.
      if (answered && lasted > 2000 && !this.gone) this.open({ again: true });
      else if (answered) this.drop(AGAIN_MS);
      else this.explain();
    };
  }

  close(phase = "off") {
    this.wanted = false;
    clearTimeout(this.timer);
    this.shut();
    this.enter(phase);
  }

  shut() {
    if (this.source) this.source.close();
    this.source = null;
  }

  drop(wait, phase = this.gone ? "gone" : "lost") {
    this.enter(phase);
    this.timer = setTimeout(() => this.wanted && this.open(), wait);
  }

  /** Ask every few seconds in place of the stream, until the process has a free one. */
  ask() {
    this.wanted = true;
    clearTimeout(this.timer);
    this.explain();
  }

  /**
   * Find out why there is no stream: EventSource hides the status of the answer, and a browser writes
   * a line about each one that fails. A process that answers has too many streams open, or a proxy
   * refuses them, so its answer takes the place of the events.
   */
  async explain() {
    try {
      const session = await get(`${SESSION}?start`, 3000);
      if (!this.wanted || this.source) return;
      if (!session.start) {
        this.close("denied");
        this.denied();
      } else if (this.gone && session.instance === this.data.instance) {
        this.drop(AGAIN_MS);
      } else {
        this.crowded = session.full;
        this.take(session.start, performance.now());
        this.lastEvent = performance.now();
        this.enter("full");
        this.changed();
        this.timer = session.full
          ? setTimeout(() => this.wanted && this.explain(), ASK_MS)
          : setTimeout(() => this.wanted && this.open(), AGAIN_MS);
      }
    } catch (error) {
      if (!this.wanted || this.source) return;
      this.refused = error.status ? error.message : "";
      if (error instanceof Problem) this.drop(AGAIN_MS);
      else this.fail(error);
    }
  }

  /** Say that the data cannot be read, and begin anew with a snapshot. */
  fail(error) {
    console.error(error);
    this.shut();
    this.lastId = "";
    this.drop(LATER_MS, "failed");
  }

  enter(phase) {
    if (this.phase === phase) return;
    this.phase = phase;
    this.since = this.now();
    this.changed();
  }

  /** Look for missing beats; called every half second. */
  watch() {
    if (!this.source) return;
    const quiet = performance.now() - Math.max(this.lastEvent, this.opened);
    if (quiet > SILENT_AFTER_MS && (this.phase === "live" || this.phase === "connecting")) {
      this.enter("silent");
    }
    if (quiet > REOPEN_AFTER_MS) {
      this.shut();
      this.open();
    }
  }

  receive(kind, event) {
    try {
      this.read(kind, JSON.parse(event.data), event.lastEventId);
    } catch (error) {
      this.fail(error);
    }
  }

  read(kind, frame, id) {
    // A process that has said that it ends may still accept a connection.
    if (this.gone && (!frame.instance || frame.instance === this.data.instance)) return;
    this.lastEvent = performance.now();
    if (id) this.lastId = id;
    this.eventAt = this.now();
    if (frame.now) this.offset = Date.parse(frame.now) - Date.now();
    if (kind === "snapshot") this.replace(frame);
    else if (this.data) this.apply(kind, frame);
    if (this.data && !this.gone) this.enter("live");
    this.changed();
  }

  replace(frame) {
    if (this.data && this.data.instance !== frame.instance) {
      this.announce(`Another process answers now: ${frame.instance}.`);
    }
    if (!this.data || this.data.instance !== frame.instance) this.began = {};
    this.gone = null;
    this.data = { remaining: frame.stop ? frame.stop.remaining : null, ...frame };
    this.upAt = this.now() - frame.uptime * 1000;
    this.noteStages(frame.stop);
  }

  apply(kind, frame) {
    const data = { ...this.data };
    if (kind === "checks") {
      const news = new Map(frame.checks.map((check) => [check.name, check]));
      data.checks = data.checks.map((check) => news.get(check.name) || check);
      for (const key of ["health", "failingGates", "failOpen"]) data[key] = frame[key];
    } else if (kind === "change") {
      data.changes = [...data.changes, frame].slice(-MAX_CHANGES);
      const code = frame.code ? ` (${frame.code})` : "";
      this.announce(`${frame.check}: ${frame.old || "unknown"} to ${frame.new}${code}`);
    } else if (kind === "state") {
      data.state = { state: frame.new, reason: frame.reason, at: frame.at };
    } else if (kind === "stop" || kind === "bye") {
      const stop = kind === "bye" ? frame.stop : frame;
      data.stop = { ...stop, previous: stop.previous || data.stop.previous };
      data.remaining = stop.remaining;
      this.noteStages(stop);
      if (kind === "bye") this.gone = { at: this.now(), left: frame.left || [] };
    } else if (kind === "circuit") {
      const known = data.circuits.some((circuit) => circuit.name === frame.name);
      data.circuits = known
        ? data.circuits.map((circuit) => (circuit.name === frame.name ? frame : circuit))
        : [...data.circuits, frame];
    } else if (kind === "queues") {
      data.queues = frame;
    } else if (kind === "beat") {
      data.remaining = frame.remaining;
      data.inFlight = frame.inFlight;
      this.upAt = this.now() - frame.uptime * 1000;
    }
    this.data = data;
  }

  noteStages(stop) {
    for (const stage of stop ? stop.stages : []) {
      if (stage.state !== "running" || this.began[stage.name]) continue;
      const starts = stage.parts.map((part) => Date.parse(part.began || "")).filter(Number.isFinite);
      this.began[stage.name] = Math.min(this.now(), ...starts);
    }
  }
}
