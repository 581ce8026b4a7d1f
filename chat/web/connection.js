// A WebSocket that reconnects, repeats unanswered sends, and reports every message once and in order.

const PAUSE = { first: 1000, longest: 8000 };
const MARKS_EVERY = 200;
const FAULTS = [1002, 1007, 1009]; // the server closed because of something that it had received
const POSITION_BYTES = 64; // the most that a position takes in a `resume`
const PING = { every: 20_000, patience: 10_000 };

export const dialogOf = (a, b) => `${Math.min(a, b)}_${Math.max(a, b)}`;

/**
 * `handlers`: state(text, bad), refused(reason), welcome(frame), message(message), read(mark), typing(dialog, user),
 * presence(user, online), resync(dialog).
 */
export class Connection {
  constructor(me, token, handlers) {
    Object.assign(this, { me, token, handlers });
    this.sends = new Map(); // by peer: sends without an answer, in order; only the first is transmitted
    this.asked = new Map(); // by id: other requests without an answer
    this.suspects = new Set(); // requests, one of which made the server close the connection: sent alone
    this.limits = { frame_bytes: Infinity, sends_per_second: 20 };
    this.pace = 0; // when the next request may be transmitted
    this.streams = new Map(); // by dialog: {last, state}, state is live, resuming or reading
    this.resumes = new Map(); // by id: the dialogs of a resume without an answer
    this.watched = new Set();
    this.marks = new Map(); // by peer: the read mark that is sent soon
    this.next = 1;
    this.pause = PAUSE.first;
    this.since = null;
    this.wait = 0;
    this.stopped = false;
    this.open();
  }

  open() {
    this.handlers.state('connecting…', false);
    const url = new URL('/v1/ws', location.href);
    url.protocol = url.protocol.replace('http', 'ws');
    if (this.since) url.searchParams.set('since', this.since);
    // A browser cannot set headers on a WebSocket: the token travels as a second subprotocol.
    const socket = new WebSocket(url, ['chat.v1', `bearer.${this.token}`]);
    this.socket = socket;
    socket.onmessage = (event) => this.socket === socket && this.receive(JSON.parse(event.data));
    socket.onclose = (event) => this.socket === socket && this.closed(event);
  }

  closed(event) {
    clearTimeout(this.timer);
    clearTimeout(this.repeats);
    if (this.stopped) return;
    this.accuse(event);
    if ([4001, 4003, 4010].includes(event.code)) {
      this.handlers.refused(event.reason);
      return;
    }
    this.handlers.state('offline, trying again…', true);
    // At any time within the pause: a crowd that lost the same server comes back spread over it.
    setTimeout(() => this.stopped || this.open(), this.wait + this.pause * Math.random());
    this.wait = 0; // asked for by the server
    this.pause = Math.min(this.pause * 2, PAUSE.longest);
  }

  receive(frame) {
    switch (frame.type) {
      case 'welcome': this.begin(frame); break;
      case 'message': this.message(frame); break;
      // An entry of another kind takes its seq, and shows nothing here.
      case 'entry': this.follows(frame); break;
      case 'sent': this.sent(frame); break;
      case 'resumed': this.resumed(frame); break;
      case 'read': this.handlers.read(frame); break;
      case 'typing': this.handlers.typing(frame.dialog, frame.user); break;
      case 'presence': this.handlers.presence(frame.user, frame.online); break;
      case 'pong': this.alive(); break;
      case 'history':
      case 'inbox': this.settle(this.asked.get(frame.id), frame); break;
      case 'error':
        if (!frame.key && !frame.id) this.wait = frame.retry_after_ms ?? 0;
        this.failed(frame);
        break;
    }
  }

  /** The connection ended. If the server closed it because of a request, that one fails and is not repeated. */
  accuse({ code, reason }) {
    const inFlight = this.requests().filter((request) => request.inFlight);
    if (!FAULTS.includes(code)) return;
    if (inFlight.length === 1) this.fail(inFlight[0], { message: `the server closed the connection: ${reason || code}` });
    else this.suspects = new Set(inFlight);
  }

  /** Says where we are, and asks again what was not answered. */
  begin(frame) {
    this.handlers.state('connected', false);
    this.resumes.clear();
    this.limits = frame.limits;
    const positions = {};
    for (const [dialog, stream] of this.streams) {
      stream.state = 'resuming';
      positions[dialog] = stream.last;
    }
    // Beyond what one frame takes, the rest is followed again when it is opened.
    const most = Math.max(1, Math.min(frame.limits.resume_dialogs, Math.floor(frame.limits.frame_bytes / POSITION_BYTES)));
    const kept = Object.entries(positions).slice(-most);
    for (const dialog of Object.keys(positions).slice(0, -most)) this.streams.delete(dialog);
    if (kept.length || this.since) this.resume(Object.fromEntries(kept), this.since);
    // An earlier one is kept until the server confirms that nothing is missing since then.
    this.since ??= frame.now;
    if (this.watched.size) this.transmit({ type: 'watch', users: [...this.watched] });
    for (const request of [...this.sends.values(), ...this.asked.values()].flat()) {
      request.inFlight = false;
      request.notBefore = 0;
    }
    this.pump();
    this.alive();
    if (!this.resumes.size) this.pause = PAUSE.first;
    this.handlers.welcome(frame);
  }

  /** A browser answers the server's pings itself and does not report them, so the page sends its own. */
  alive() {
    clearTimeout(this.timer);
    const socket = this.socket;
    this.timer = setTimeout(() => {
      this.transmit({ type: 'ping' });
      this.timer = setTimeout(() => {
        // Closing would wait for an answer that does not come.
        socket.close();
        if (this.socket === socket) { this.socket = null; this.closed({}); }
      }, PING.patience);
    }, PING.every);
  }

  resume(positions, since) {
    const id = String(this.next++);
    this.resumes.set(id, Object.keys(positions));
    this.transmit({ type: 'resume', id, positions, ...(since && { since }) });
  }

  /** Everything of a dialog above `last`, from now on. */
  follow(dialog, last) {
    this.streams.set(dialog, { last, state: 'resuming' });
    if (this.isOpen()) this.resume({ [dialog]: last });
  }

  message(message) {
    if (message.from === this.me && message.key) {
      // One of ours that we do not know to be stored, because the answer was lost with a connection.
      this.settle(this.sendOf(message.dialog, message.key), message);
    }
    // The page shows dialogs between two; a message of a room has no `to`.
    if (this.follows(message) && message.to) this.handlers.message(message);
  }

  sent({ key, dialog, seq, at, early }) {
    const waiting = this.sendOf(dialog, key);
    // After an early answer the message comes once more, in its place.
    if (waiting && !early) {
      const message = { ...waiting.message, dialog, seq, at };
      if (this.follows(message)) this.handlers.message(message);
    }
    this.settle(waiting, { dialog, seq, at });
  }

  /** Whether a message is to be shown now: it follows what was shown, or nothing before it is owed. */
  follows({ dialog, seq }) {
    const stream = this.streams.get(dialog);
    if (!stream) {
      this.streams.set(dialog, { last: seq, state: 'live' });
      return true;
    }
    const show = { live: seq > stream.last, resuming: seq === stream.last + 1, reading: false }[stream.state];
    if (show) stream.last = seq;
    return show;
  }

  resumed({ id, resync, reads, now }) {
    this.pause = PAUSE.first;
    this.since = now;
    for (const dialog of this.resumes.get(id) ?? []) {
      const stream = this.streams.get(dialog);
      if (stream?.state === 'resuming') stream.state = 'live';
    }
    this.resumes.delete(id);
    reads.forEach((mark) => this.handlers.read(mark));
    for (const dialog of resync) {
      if (this.streams.has(dialog)) this.readOn(dialog); else this.handlers.resync(dialog);
    }
  }

  /** Reads in pages what is too much to be replayed. */
  async readOn(dialog) {
    const stream = this.streams.get(dialog);
    stream.state = 'reading';
    try {
      for (let more = true; more;) {
        const page = await this.history({ in: dialog, after: stream.last });
        if (this.streams.get(dialog) !== stream || stream.state !== 'reading') return;
        if (!page.messages.length && !page.more) {
          // The log is shorter than what we had of it.
          this.streams.delete(dialog);
          this.handlers.resync(dialog);
          return;
        }
        for (const message of page.messages) {
          stream.last = message.seq;
          if (message.to) this.handlers.message(message);
        }
        more = page.more;
      }
      this.follow(dialog, stream.last);
    } catch (error) {
      this.handlers.state(error.message, true);
    }
  }

  peerOf(dialog) {
    const [low, high] = dialog.split('_').map(Number);
    return low === this.me ? high : low;
  }

  /** The send of this key, if it is the one that is transmitted. */
  sendOf(dialog, key) {
    const first = this.sends.get(this.peerOf(dialog))?.[0];
    return first?.frame.key === key ? first : undefined;
  }

  /** What may be transmitted now: the first send of each dialog, so that none overtakes an earlier one, and what was asked. */
  requests() { return [...[...this.sends.values()].map(([first]) => first), ...this.asked.values()]; }

  /** Transmits what is due, and comes back when the next request is. */
  pump() {
    clearTimeout(this.repeats);
    if (!this.isOpen()) return;
    const now = Date.now();
    const [suspect] = this.suspects;
    const alone = suspect && [suspect].filter(() => !this.requests().some((request) => request.inFlight));
    const waiting = (alone ?? this.requests()).filter((request) => !request.inFlight);
    const due = waiting.filter(({ notBefore }) => notBefore <= now);
    while (due.length && this.pace <= now) {
      const request = due.shift();
      const text = JSON.stringify(request.frame);
      if (new TextEncoder().encode(text).length > this.limits.frame_bytes) {
        this.fail(request, { message: 'too long for this server' });
        return; // the rest went out with it
      }
      request.inFlight = true;
      this.socket.send(text);
      // As many a second as the server takes, and up to a second's worth at once.
      this.pace = Math.max(this.pace, now - 1000) + 1000 / this.limits.sends_per_second;
    }
    const later = waiting.map(({ notBefore }) => notBefore).filter((at) => at > now);
    if (due.length) later.push(this.pace);
    if (later.length) this.repeats = setTimeout(() => this.pump(), Math.min(...later) - now);
  }

  failed(error) {
    const request = error.dialog && error.key ? this.sendOf(error.dialog, error.key) : this.asked.get(error.id);
    if (!request) return;
    if (!error.retryable) {
      this.fail(request, error);
      return;
    }
    request.inFlight = false;
    // Not this one alone is too early, but every request.
    if (error.code === 'rate_limited') this.pace = Math.max(this.pace, Date.now() + (error.retry_after_ms ?? 1000));
    else request.notBefore = Date.now() + (error.retry_after_ms ?? 250) * (1 + Math.random() / 2);
    this.pump();
  }

  settle(request, answer) {
    if (!request) return;
    this.remove(request);
    request.resolve(answer);
    this.pump();
  }

  fail(request, error) {
    this.remove(request);
    request.reject(error);
    this.pump();
  }

  remove(request) {
    this.suspects.delete(request);
    const { id, to } = request.frame;
    if (request.frame.type !== 'send') {
      this.asked.delete(id);
      return;
    }
    const rest = (this.sends.get(to) ?? []).filter((other) => other !== request);
    if (rest.length) this.sends.set(to, rest); else this.sends.delete(to);
  }

  isOpen() { return this.socket?.readyState === WebSocket.OPEN; }

  transmit(frame) {
    if (this.isOpen()) this.socket.send(JSON.stringify(frame));
  }

  request(frame, message) {
    return new Promise((resolve, reject) => {
      const request = { frame, message, resolve, reject, inFlight: false, notBefore: 0 };
      if (frame.type === 'send') this.sends.set(frame.to, [...(this.sends.get(frame.to) ?? []), request]);
      else this.asked.set(frame.id, request);
      this.pump();
    });
  }

  /** Stored in the order of the calls, in each dialog. */
  send(to, key, text) { return this.request({ type: 'send', key, to, text }, { from: this.me, to, text, key }); }
  /** The messages to a user that are not stored yet, in order. */
  waitingFor(peer) { return (this.sends.get(peer) ?? []).map(({ message }) => message); }
  history(query) { return this.request({ type: 'history', id: String(this.next++), ...query }); }
  inbox(cursor) { return this.request({ type: 'inbox', id: String(this.next++), limit: 30, ...(cursor && { cursor }) }); }
  /** Who reads a hundred messages at once says so once. */
  read(peer, seq) {
    if (!this.marks.size) {
      setTimeout(() => {
        for (const [peer, seq] of this.marks) this.transmit({ type: 'read', with: peer, seq });
        this.marks.clear();
      }, MARKS_EVERY);
    }
    this.marks.set(peer, Math.max(seq, this.marks.get(peer) ?? 0));
  }
  typing(peer) { this.transmit({ type: 'typing', with: peer }); }
  watch(user) { this.watched.add(user); this.transmit({ type: 'watch', users: [user] }); }
  unwatch(user) { this.watched.delete(user); this.transmit({ type: 'unwatch', users: [user] }); }
  stop() {
    this.stopped = true;
    clearTimeout(this.timer);
    clearTimeout(this.repeats);
    this.socket?.close(1000);
  }
}
