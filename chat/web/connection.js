// A WebSocket that reconnects, repeats unanswered sends, and reports every message once and in order.

const GENERATION = 2 ** 40; // seqs begin again above a multiple of this; see PROTOCOL.md
const PAUSE = { first: 1000, longest: 8000 };
const MARKS_EVERY = 200;
const PING = { every: 20_000, patience: 10_000 };

export const dialogOf = (a, b) => `${Math.min(a, b)}_${Math.max(a, b)}`;

/**
 * `handlers`: state(text, bad), refused(reason), welcome(frame), message(message), read(mark), typing(dialog, user),
 * presence(user, online), resync(dialog).
 */
export class Connection {
  constructor(me, token, handlers) {
    Object.assign(this, { me, token, handlers });
    this.waiting = new Map(); // by key or id: {frame, message?, resolve, reject}
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
    // A browser cannot set headers on a WebSocket: the token travels as a second subprotocol.
    const socket = new WebSocket(url, ['chat.v1', `bearer.${this.token}`]);
    this.socket = socket;
    socket.onmessage = (event) => this.socket === socket && this.receive(JSON.parse(event.data));
    socket.onclose = (event) => this.socket === socket && this.closed(event);
  }

  closed(event) {
    clearTimeout(this.timer);
    if (this.stopped) return;
    if (event.code === 4001 || event.code === 4003) {
      this.handlers.refused(event.reason);
      return;
    }
    this.handlers.state('offline, trying again…', true);
    // Any time within the pause: a crowd that lost the same server comes back spread over it.
    setTimeout(() => this.stopped || this.open(), this.wait + this.pause * Math.random());
    this.wait = 0; // asked for by the server
    this.pause = Math.min(this.pause * 2, PAUSE.longest);
  }

  receive(frame) {
    switch (frame.type) {
      case 'welcome': this.begin(frame); break;
      case 'message': this.message(frame); break;
      case 'sent': this.sent(frame); break;
      case 'resumed': this.resumed(frame); break;
      case 'read': this.handlers.read(frame); break;
      case 'typing': this.handlers.typing(frame.dialog, frame.user); break;
      case 'presence': this.handlers.presence(frame.user, frame.online); break;
      case 'pong': this.alive(); break;
      case 'history':
      case 'inbox': this.settle(`id ${frame.id}`, frame); break;
      case 'error':
        if (!frame.key && !frame.id) this.wait = frame.retry_after_ms ?? 0;
        this.failed(frame);
        break;
    }
  }

  /** Says where we are, and asks again what was not answered. */
  begin(frame) {
    this.handlers.state('connected', false);
    this.resumes.clear();
    const positions = {};
    for (const [dialog, stream] of this.streams) {
      stream.state = 'resuming';
      positions[dialog] = stream.last;
    }
    // Beyond what one frame takes, the rest is followed again when it is opened.
    const most = frame.limits.resume_dialogs;
    const kept = Object.entries(positions).slice(-most);
    for (const dialog of Object.keys(positions).slice(0, -most)) this.streams.delete(dialog);
    if (kept.length || this.since) this.resume(Object.fromEntries(kept), this.since);
    this.since = frame.now;
    if (this.watched.size) this.transmit({ type: 'watch', users: [...this.watched] });
    for (const { frame } of this.waiting.values()) this.transmit(frame);
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
      this.settle(`key ${message.key}`, message);
    }
    if (this.follows(message)) this.handlers.message(message);
  }

  sent({ key, dialog, seq, at }) {
    const waiting = this.waiting.get(`key ${key}`);
    const stream = this.streams.get(dialog);
    // An answer may come early, when the database of what is before it does not answer: then it comes once more, in its place.
    const early = stream && seq > stream.last + 1 && seq % GENERATION !== 1;
    if (waiting && !early) {
      const message = { ...waiting.message, dialog, seq, at };
      if (this.follows(message)) this.handlers.message(message);
    }
    this.settle(`key ${key}`, { dialog, seq, at });
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
    const [low, high] = dialog.split('_').map(Number);
    const peer = low === this.me ? high : low;
    try {
      for (let more = true; more;) {
        const page = await this.history({ with: peer, after: stream.last });
        if (this.streams.get(dialog) !== stream || stream.state !== 'reading') return;
        if (!page.messages.length && !page.more) {
          // The log is shorter than what we had of it.
          this.streams.delete(dialog);
          this.handlers.resync(dialog);
          return;
        }
        for (const message of page.messages) {
          stream.last = message.seq;
          this.handlers.message(message);
        }
        more = page.more;
      }
      this.follow(dialog, stream.last);
    } catch (error) {
      this.handlers.state(error.message, true);
    }
  }

  failed(error) {
    const name = error.key ? `key ${error.key}` : `id ${error.id}`;
    const waiting = this.waiting.get(name);
    if (!waiting) return;
    if (error.retryable) {
      setTimeout(() => this.waiting.has(name) && this.transmit(waiting.frame), (error.retry_after_ms ?? 250) * (1 + Math.random() / 2));
    } else {
      this.waiting.delete(name);
      waiting.reject(error);
    }
  }

  settle(name, frame) {
    this.waiting.get(name)?.resolve(frame);
    this.waiting.delete(name);
  }

  isOpen() { return this.socket?.readyState === WebSocket.OPEN; }

  transmit(frame) {
    if (this.isOpen()) this.socket.send(JSON.stringify(frame));
  }

  ask(name, frame, message) {
    return new Promise((resolve, reject) => {
      this.waiting.set(name, { frame, message, resolve, reject });
      this.transmit(frame);
    });
  }

  send(to, key, text) { return this.ask(`key ${key}`, { type: 'send', key, to, text }, { from: this.me, to, text, key }); }
  history(query) { const id = String(this.next++); return this.ask(`id ${id}`, { type: 'history', id, ...query }); }
  inbox(cursor) { const id = String(this.next++); return this.ask(`id ${id}`, { type: 'inbox', id, limit: 30, ...(cursor && { cursor }) }); }
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
  stop() { this.stopped = true; clearTimeout(this.timer); this.socket?.close(1000); }
}
