// The page: sign in, a list of dialogs, a conversation. Whatever a person wrote is set as textContent, never as HTML.

const $ = (id) => document.getElementById(id);
const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

/** A WebSocket that comes back by itself, and repeats what was not answered. */
class Connection {
  constructor(token, handlers) {
    this.token = token;
    this.handlers = handlers;
    this.waiting = new Map(); // by key or id: {frame, resolve, reject}
    this.next = 1;
    this.pause = 250;
    this.stopped = false;
    this.open();
  }

  open() {
    this.handlers.state('connecting…', false);
    const url = new URL('/v1/ws', location.href);
    url.protocol = url.protocol.replace('http', 'ws');
    // A browser cannot set headers on a WebSocket: the token travels as a second subprotocol.
    this.socket = new WebSocket(url, ['chat.v1', `bearer.${this.token}`]);
    this.socket.onmessage = (event) => this.receive(JSON.parse(event.data));
    this.socket.onclose = (event) => this.closed(event);
  }

  closed(event) {
    if (this.stopped) return;
    if (event.code === 4001 || event.code === 4003) {
      this.handlers.refused(event.reason);
      return;
    }
    this.handlers.state('offline, trying again…', true);
    // Jitter keeps a crowd that lost the same server from coming back in step.
    setTimeout(() => this.stopped || this.open(), this.pause * (0.5 + Math.random() / 2));
    this.pause = Math.min(this.pause * 2, 5000);
  }

  receive(frame) {
    switch (frame.type) {
      case 'welcome':
        this.pause = 250;
        this.handlers.state('connected', false);
        for (const { frame } of this.waiting.values()) this.socket.send(frame);
        this.handlers.welcome(frame);
        break;
      case 'message': this.handlers.message(frame); break;
      case 'read': this.handlers.read(frame); break;
      case 'sent': this.settle(`key ${frame.key}`, frame); break;
      case 'history':
      case 'inbox': this.settle(`id ${frame.id}`, frame); break;
      case 'error': this.failed(frame); break;
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

  transmit(text) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(text);
  }

  ask(name, frame) {
    const text = JSON.stringify(frame);
    return new Promise((resolve, reject) => {
      this.waiting.set(name, { frame: text, resolve, reject });
      this.transmit(text);
    });
  }

  send(to, key, text) { return this.ask(`key ${key}`, { type: 'send', key, to, text }); }
  history(query) { const id = String(this.next++); return this.ask(`id ${id}`, { type: 'history', id, ...query }); }
  inbox(cursor) { const id = String(this.next++); return this.ask(`id ${id}`, { type: 'inbox', id, limit: 30, ...(cursor && { cursor }) }); }
  read(peer, seq) { this.transmit(JSON.stringify({ type: 'read', with: peer, seq })); }
  stop() { this.stopped = true; this.socket.close(1000); }
}

/** One dialog on the screen: everything from `first` to `last`, in order and without a gap. */
class Conversation {
  constructor(app, peer) {
    this.app = app;
    this.peer = peer;
    this.first = null;
    this.last = 0;
    this.pending = new Map(); // key -> element
    this.working = Promise.resolve();
    $('log').replaceChildren();
    $('older').hidden = true;
    $('gap').hidden = true;
    $('with').textContent = peer === app.me ? 'Notes to self' : `User ${peer}`;
  }

  current() { return this.app.conversation === this; }

  /** Reads what is missing above `last`; on entry, the newest page. One at a time. */
  catchUp() {
    this.working = this.working.then(async () => {
      for (let more = true; more && this.current();) {
        const entering = this.first === null;
        const page = await this.app.connection.history({ with: this.peer, limit: 50, ...(!entering && { after: this.last }) });
        if (!this.current()) return;
        page.messages.forEach((message) => this.append(message));
        if (entering) {
          this.first = page.first;
          this.above(page);
        }
        more = !entering && page.more;
        this.markRead();
      }
    }).catch((error) => this.app.note(error.message));
  }

  async older() {
    const box = $('log-box');
    const before = box.scrollHeight - box.scrollTop;
    const page = await this.app.connection.history({ with: this.peer, before: this.first, limit: 50 });
    if (!this.current()) return;
    $('log').prepend(...page.messages.map((message) => this.draw(message)));
    this.first = page.first || this.first;
    this.above(page);
    box.scrollTop = box.scrollHeight - before;
  }

  /** What stands above the messages on the screen. */
  above(page) {
    $('older').hidden = !page.more;
    $('gap').hidden = !page.gap;
  }

  /** A message that is told live. */
  take(message) {
    if (message.seq <= this.last) return;
    if (this.first !== null && message.seq === this.last + 1) {
      this.append(message);
      this.markRead();
    } else {
      this.catchUp();
    }
  }

  append(message) {
    if (message.seq <= this.last) return;
    this.last = message.seq;
    if (this.first === null || this.first === 0) this.first = message.seq;
    const box = $('log-box');
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
    const drawn = this.draw(message);
    const pending = message.from === this.app.me && this.pending.get(message.key);
    if (pending) {
      pending.remove();
      this.pending.delete(message.key);
    }
    const firstPending = this.pending.values().next().value;
    $('log').insertBefore(drawn, firstPending ?? null);
    if (atEnd || message.from === this.app.me) box.scrollTop = box.scrollHeight;
  }

  draw(message, state) {
    const item = element('li', message.from === this.app.me ? 'mine' : '');
    if (state) item.classList.add(state);
    const text = element('div', 'text', message.text);
    text.dir = 'auto';
    item.append(text, element('div', 'meta', state === 'pending' ? 'sending…' : time(message.at)));
    if (message.seq) item.dataset.seq = message.seq;
    return item;
  }

  async send(text) {
    const key = crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('');
    const item = this.draw({ from: this.app.me, text, at: '' }, 'pending');
    this.pending.set(key, item);
    $('log').append(item);
    $('log-box').scrollTop = $('log-box').scrollHeight;
    try {
      const sent = await this.app.connection.send(this.peer, key, text);
      const message = { dialog: sent.dialog, seq: sent.seq, from: this.app.me, to: this.peer, text, at: sent.at, key };
      this.app.heard(message);
    } catch (error) {
      this.pending.delete(key);
      item.classList.replace('pending', 'failed');
      item.querySelector('.meta').textContent = `not sent: ${error.message}`;
    }
  }

  markRead() {
    if (this.last > 0 && document.visibilityState === 'visible') {
      this.app.connection.read(this.peer, this.last);
      this.app.forgetUnread(this.peer);
    }
  }
}

class App {
  constructor(me, token) {
    this.me = me;
    this.dialogs = new Map(); // peer -> {with, last, unread}
    this.conversation = null;
    $('me').textContent = `User ${me}`;
    $('sign-in').hidden = true;
    $('chat').hidden = false;
    this.connection = new Connection(token, {
      state: (text, bad) => { $('state').textContent = text; $('state').classList.toggle('bad', bad); },
      refused: (reason) => signOut(`Signed out: ${reason}`),
      welcome: (frame) => {
        $('text').maxLength = frame.limits.text_chars * 2; // counted in UTF-16 here; the server counts characters
        this.loadInbox();
        this.conversation?.catchUp();
      },
      message: (message) => this.heard(message),
      read: (mark) => mark.user === this.me && this.dialogs.size && this.loadInbox(),
    });
  }

  note(text) { $('inbox-note').textContent = text; $('inbox-note').hidden = !text; }

  async loadInbox(cursor) {
    try {
      const page = await this.connection.inbox(cursor);
      if (!cursor) this.dialogs.clear();
      for (const dialog of page.dialogs) this.dialogs.set(dialog.with, dialog);
      this.note(page.incomplete.length ? `Incomplete: ${page.incomplete.join(', ')} is away: what only it has is not shown.` : '');
      this.cursor = page.cursor;
      this.list();
    } catch (error) { this.note(error.message); }
  }

  /** A message of ours or to us, from wherever it was heard. */
  heard(message) {
    const peer = message.from === this.me ? message.to : message.from;
    const known = this.dialogs.get(peer);
    if (!known || known.last.seq < message.seq) {
      const open = this.conversation?.peer === peer && document.visibilityState === 'visible';
      const unread = message.from === this.me || open ? (known?.unread ?? 0) : Math.min((known?.unread ?? 0) + 1, 100);
      this.dialogs.set(peer, { with: peer, last: message, unread });
      this.list();
    }
    if (this.conversation?.peer === peer) this.conversation.take(message);
  }

  forgetUnread(peer) {
    const dialog = this.dialogs.get(peer);
    if (dialog?.unread) { dialog.unread = 0; this.list(); }
  }

  list() {
    const rows = [...this.dialogs.values()].sort((a, b) => (a.last.at < b.last.at ? 1 : -1)).map((dialog) => {
      const button = element('button', this.conversation?.peer === dialog.with ? 'open' : '');
      button.dataset.with = dialog.with;
      button.append(element('strong', '', dialog.with === this.me ? 'Notes to self' : `User ${dialog.with}`), element('time', '', time(dialog.last.at)));
      const own = dialog.last.from === this.me && dialog.with !== this.me;
      button.append(element('span', 'preview', (own ? 'You: ' : '') + dialog.last.text.slice(0, 200)));
      if (dialog.unread) button.append(element('span', 'unread', dialog.unread > 99 ? '99+' : String(dialog.unread)));
      button.onclick = () => this.open(dialog.with);
      const item = element('li');
      item.append(button);
      return item;
    });
    $('dialogs').replaceChildren(...rows);
    $('more-dialogs').hidden = !this.cursor;
  }

  open(peer) {
    $('conversation').hidden = false;
    $('nothing').hidden = true;
    $('chat').classList.add('reading');
    this.conversation = new Conversation(this, peer);
    this.conversation.catchUp();
    this.list();
  }
}

const time = (at) => {
  if (!at) return '';
  const date = new Date(at);
  const today = date.toDateString() === new Date().toDateString();
  return today ? date.toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' }) : date.toLocaleDateString();
};

let app = null;

const start = (user, token) => {
  // Each tab may be somebody else: what is kept belongs to the tab.
  sessionStorage.setItem('chat', JSON.stringify({ user, token }));
  app = new App(user, token);
};

const signOut = (why = '') => {
  sessionStorage.removeItem('chat');
  app?.connection.stop();
  app = null;
  $('chat').hidden = true;
  $('sign-in').hidden = false;
  $('sign-in-error').textContent = why;
};

const userOf = (token) => {
  try { return Number(JSON.parse(atob(token.split('.')[1].replaceAll('-', '+').replaceAll('_', '/'))).sub); } catch { return NaN; }
};

$('sign-in-form').onsubmit = async (event) => {
  event.preventDefault();
  $('sign-in-error').textContent = '';
  const given = $('token').value.trim();
  if (given) {
    const user = userOf(given);
    if (user > 0) start(user, given); else $('sign-in-error').textContent = 'This is not a token.';
    return;
  }
  const user = Number($('user').value);
  if (!Number.isSafeInteger(user) || user < 1) {
    $('sign-in-error').textContent = 'A user id is a whole number from 1 on.';
    return;
  }
  const answer = await fetch('/v1/dev/token', { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ user }) }).catch(() => null);
  if (answer?.ok) {
    start(user, (await answer.json()).token);
  } else if (answer?.status === 404) {
    // Not embedded mode: whoever runs the service hands out tokens.
    $('token-label').hidden = false;
    $('sign-in-error').textContent = 'This server mints no tokens here. Paste one.';
  } else {
    $('sign-in-error').textContent = 'The server does not answer.';
  }
};
$('sign-out').onclick = () => signOut();
$('open-form').onsubmit = (event) => {
  event.preventDefault();
  const peer = Number($('open-with').value);
  if (Number.isSafeInteger(peer) && peer > 0) { app.open(peer); $('open-with').value = ''; $('text').focus(); }
};
$('send-form').onsubmit = (event) => {
  event.preventDefault();
  const text = $('text').value;
  if (text) { app.conversation.send(text); $('text').value = ''; }
};
$('text').onkeydown = (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); $('send-form').requestSubmit(); }
};
$('older').onclick = () => app.conversation.older();
$('more-dialogs').onclick = () => app.loadInbox(app.cursor);
$('back').onclick = () => { $('chat').classList.remove('reading'); app.conversation = null; $('conversation').hidden = true; $('nothing').hidden = false; app.list(); };
document.addEventListener('visibilitychange', () => app?.conversation?.markRead());

const kept = JSON.parse(sessionStorage.getItem('chat') ?? 'null');
if (kept) start(kept.user, kept.token);
