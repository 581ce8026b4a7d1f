// The page: sign in, a list of dialogs, a conversation. Whatever a person wrote is set as textContent, never as HTML.

import { Connection, dialogOf } from './connection.js';

const $ = (id) => document.getElementById(id);
const element = (tag, className, text) => {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

/** One dialog on the screen: everything from `first` to `last`, in order and without a gap. */
class Conversation {
  constructor(app, peer) {
    this.app = app;
    this.peer = peer;
    this.dialog = dialogOf(app.me, peer);
    this.first = null;
    this.last = 0;
    this.seen = 0; // up to where the other has read
    this.pending = new Map(); // key -> element
    $('log').replaceChildren();
    $('older').hidden = true;
    $('gap').hidden = true;
    $('with').textContent = peer === app.me ? 'Notes to self' : `User ${peer}`;
    $('text').value = app.drafts.get(peer) ?? '';
    this.presence(null);
    this.typing(false);
    if (peer !== app.me) app.connection.watch(peer);
  }

  leave() {
    clearTimeout(this.typingEnds);
    const draft = $('text').value;
    if (draft) this.app.drafts.set(this.peer, draft); else this.app.drafts.delete(this.peer);
    if (this.peer !== this.app.me) this.app.connection.unwatch(this.peer);
  }

  current() { return this.app.conversation === this; }

  /** Shows the newest page, and follows the dialog from there. */
  async enter() {
    try {
      const page = await this.app.connection.history({ with: this.peer, limit: 50 });
      if (!this.current()) return;
      this.first = page.first;
      page.messages.forEach((message) => this.append(message));
      // A send may be stored before we know that it is.
      const stored = new Set(page.messages.filter(({ from }) => from === this.app.me).map(({ key }) => key));
      const waiting = this.app.connection.waitingFor(this.peer).filter(({ key }) => !stored.has(key));
      waiting.forEach((message) => this.wait(message));
      $('log-box').scrollTop = $('log-box').scrollHeight;
      this.above(page);
      this.app.connection.follow(this.dialog, page.last);
      this.markRead();
    } catch (error) { this.app.note(error.message); }
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

  /** A message from the connection: in order, but messages before the first page are in it, or follow it again. */
  take(message) {
    if (this.first === null || message.seq <= this.last) return;
    this.append(message);
    if (message.from !== this.app.me) this.typing(false);
    this.markRead();
  }

  append(message) {
    this.last = message.seq;
    if (!this.first) this.first = message.seq;
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
    const mine = message.from === this.app.me;
    const item = element('li', mine ? 'mine' : '');
    if (state) item.classList.add(state);
    const text = element('div', 'text', message.text);
    text.dir = 'auto';
    item.append(text, element('div', 'meta', state === 'pending' ? 'sending…' : time(message.at)));
    if (message.seq) {
      item.dataset.seq = message.seq;
      if (mine && this.peer !== this.app.me) item.classList.toggle('seen', message.seq <= this.seen);
    }
    return item;
  }

  /** The other has read up to there. */
  seenUpTo(seq) {
    this.seen = Math.max(this.seen, seq);
    for (const item of $('log').querySelectorAll('li.mine:not(.seen)')) {
      if (item.dataset.seq && Number(item.dataset.seq) <= this.seen) item.classList.add('seen');
    }
  }

  presence(online) {
    $('presence').textContent = this.peer === this.app.me || online === null ? '' : online ? 'online' : 'offline';
    $('presence').classList.toggle('online', online === true);
  }

  typing(now) {
    clearTimeout(this.typingEnds);
    $('typing').hidden = !now;
    if (now) this.typingEnds = setTimeout(() => this.current() && this.typing(false), 6000);
  }

  /** Shows a message that is not stored yet, below those that are. */
  wait(message) {
    if (this.pending.has(message.key)) return;
    const item = this.draw({ ...message, at: '' }, 'pending');
    this.pending.set(message.key, item);
    $('log').append(item);
    $('log-box').scrollTop = $('log-box').scrollHeight;
  }

  async send(text) {
    const key = crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('');
    const sending = this.app.connection.send(this.peer, key, text);
    this.wait({ from: this.app.me, text, key });
    try {
      // It is shown at its place in the order, when the connection reports it.
      await sending;
    } catch (error) {
      const shown = this.app.conversation?.pending.get(key);
      this.app.conversation?.pending.delete(key);
      if (shown) {
        shown.classList.replace('pending', 'failed');
        shown.querySelector('.meta').textContent = `not sent: ${error.message}`;
      } else {
        this.app.note(`Not sent to user ${this.peer}: ${error.message}: ${text}`);
      }
    }
  }

  /** Marks as read what is on the screen: all of it, if its end is. */
  markRead() {
    const box = $('log-box');
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
    if (this.last > 0 && atEnd && document.visibilityState === 'visible') {
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
    this.drafts = new Map(); // peer -> what is written and not sent
    this.rows = new Map(); // peer -> its row in the list
    $('me').textContent = `User ${me}`;
    $('sign-in').hidden = true;
    $('chat').hidden = false;
    const of = (dialog) => (this.conversation?.dialog === dialog ? this.conversation : null);
    this.connection = new Connection(me, token, {
      state: (text, bad) => {
        $('state').textContent = text;
        $('state').classList.toggle('bad', bad);
        $('offline').textContent = text;
        $('offline').hidden = !bad;
      },
      refused: (reason) => signOut(`Signed out: ${reason}`),
      welcome: (frame) => {
        $('text').maxLength = frame.limits.text_chars * 2; // counted in UTF-16 here; the server counts characters
        this.loadInbox();
      },
      message: (message) => this.received(message),
      read: (mark) => (mark.user === this.me ? this.readElsewhere(mark) : of(mark.dialog)?.seenUpTo(mark.seq)),
      typing: (dialog, user) => user !== this.me && of(dialog)?.typing(true),
      presence: (user, online) => this.conversation?.peer === user && this.conversation.presence(online),
      resync: (dialog) => {
        this.loadInbox();
        if (of(dialog)) this.open(this.conversation.peer);
      },
    });
  }

  note(text) { $('inbox-note').textContent = text; $('inbox-note').hidden = !text; }

  async loadInbox(cursor) {
    try {
      const page = await this.connection.inbox(cursor);
      if (!cursor) this.dialogs.clear();
      // The page shows dialogs between two; a room has no `with`.
      for (const dialog of page.dialogs.filter((dialog) => dialog.with)) this.dialogs.set(dialog.with, dialog);
      this.note(page.incomplete.length ? `Incomplete: ${page.incomplete.join(', ')} is away: what only it has is not shown.` : '');
      this.cursor = page.cursor;
      this.list();
    } catch (error) { this.note(error.message); }
  }

  /** A message of ours or to us, from any source; once. */
  received(message) {
    const peer = message.from === this.me ? message.to : message.from;
    const known = this.dialogs.get(peer);
    if (!known || known.last.seq < message.seq) {
      // An open conversation marks as read what is on the screen.
      const unread = message.from === this.me ? (known?.unread ?? 0) : Math.min((known?.unread ?? 0) + 1, 100);
      this.dialogs.set(peer, { with: peer, last: message, unread });
      this.list();
    }
    if (this.conversation?.peer === peer) this.conversation.take(message);
  }

  /** We have read, here or on another device. */
  readElsewhere(mark) {
    const known = [...this.dialogs.values()].find((dialog) => dialogOf(this.me, dialog.with) === mark.dialog);
    if (known?.unread && mark.seq >= known.last.seq) this.forgetUnread(known.with);
    else if (known?.unread) this.loadInbox();
  }

  forgetUnread(peer) {
    const dialog = this.dialogs.get(peer);
    if (dialog?.unread) { dialog.unread = 0; this.list(); }
  }

  list() {
    const sorted = [...this.dialogs.values()].sort((a, b) => (a.last.at < b.last.at ? 1 : -1));
    const rows = sorted.map((dialog) => this.row(dialog));
    for (const peer of this.rows.keys()) if (!this.dialogs.has(peer)) this.rows.delete(peer);
    // A row that moves loses the focus of the keyboard.
    const focused = document.activeElement;
    if (rows.some((row, n) => $('dialogs').children[n] !== row) || $('dialogs').children.length !== rows.length) $('dialogs').replaceChildren(...rows);
    if (focused !== document.activeElement && $('dialogs').contains(focused)) focused.focus({ preventScroll: true });
    $('more-dialogs').hidden = !this.cursor;
  }

  /** The row of a dialog in the list: made once, so that it keeps its place and focus. */
  row({ with: peer, last, unread }) {
    let item = this.rows.get(peer);
    if (!item) {
      item = element('li');
      const button = element('button');
      button.dataset.with = peer;
      button.onclick = () => this.open(peer);
      item.append(button);
      this.rows.set(peer, item);
    }
    const button = item.firstChild;
    button.classList.toggle('open', this.conversation?.peer === peer);
    const own = last.from === this.me && peer !== this.me;
    button.replaceChildren(
      element('strong', '', peer === this.me ? 'Notes to self' : `User ${peer}`),
      element('time', '', time(last.at)),
      element('span', 'preview', (own ? 'You: ' : '') + last.text.slice(0, 200)),
      ...(unread ? [element('span', 'unread', unread > 99 ? '99+' : String(unread))] : []),
    );
    return item;
  }

  open(peer) {
    $('conversation').hidden = false;
    $('nothing').hidden = true;
    $('chat').classList.add('reading');
    this.leave();
    this.conversation = new Conversation(this, peer);
    this.conversation.enter();
    this.list();
  }

  /** Closes what is open. */
  leave() {
    this.conversation?.leave();
    this.conversation = null;
    $('text').value = '';
  }

  /** Closes the conversation and shows the list. */
  close() {
    this.leave();
    $('chat').classList.remove('reading');
    $('conversation').hidden = true;
    $('nothing').hidden = false;
  }
}

const time = (at) => {
  if (!at) return '';
  const date = new Date(at);
  const today = date.toDateString() === new Date().toDateString();
  return today ? date.toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' }) : date.toLocaleDateString();
};

const USER_ID = 'A user id is a whole number from 1 on.';

let app = null;

const start = (user, token) => {
  // Each tab may be another user: the storage belongs to the tab.
  sessionStorage.setItem('chat', JSON.stringify({ user, token }));
  app = new App(user, token);
};

const signOut = (why = '') => {
  sessionStorage.removeItem('chat');
  app?.close();
  app?.connection.stop();
  app = null;
  // Nothing of this user stays for the next one.
  for (const id of ['log', 'dialogs']) $(id).replaceChildren();
  for (const id of ['me', 'state', 'with', 'presence', 'inbox-note', 'offline']) $(id).textContent = '';
  for (const id of ['user', 'token', 'open-with', 'text']) $(id).value = '';
  $('open-error').textContent = '';
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
    $('sign-in-error').textContent = USER_ID;
    return;
  }
  const answer = await fetch('/v1/dev/token', { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ user }) }).catch(() => null);
  if (answer?.ok) {
    start(user, (await answer.json()).token);
  } else if (answer?.status === 404) {
    // Not embedded mode: tokens come from the operator.
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
  const valid = Number.isSafeInteger(peer) && peer > 0;
  $('open-error').textContent = valid ? '' : USER_ID;
  if (valid) { app.open(peer); $('open-with').value = ''; $('text').focus(); }
};
$('send-form').onsubmit = (event) => {
  event.preventDefault();
  const text = $('text').value;
  if (text) { app.conversation.send(text); $('text').value = ''; typed = 0; }
};
$('text').onkeydown = (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); $('send-form').requestSubmit(); }
};
let typed = 0;
$('text').oninput = () => {
  if (Date.now() - typed > 3000 && app.conversation.peer !== app.me) {
    typed = Date.now();
    app.connection.typing(app.conversation.peer);
  }
};
$('older').onclick = () => app.conversation.older();
$('more-dialogs').onclick = () => app.loadInbox(app.cursor);
$('back').onclick = () => { app.close(); app.list(); };
$('log-box').onscroll = () => app?.conversation?.markRead();
document.addEventListener('visibilitychange', () => app?.conversation?.markRead());

const kept = JSON.parse(sessionStorage.getItem('chat') ?? 'null');
if (kept) start(kept.user, kept.token);
