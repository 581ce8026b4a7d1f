"""The closed loop of bench/peers: pairs of users, each sender waits until the peer has its message before it sends the next. The same
lean client for both: bytes on asyncio streams, XMPP or WebSocket.

usage: peers.py xmpp PORT | chat URL,URL SECRET      with two URLs sender and receiver are on different instances"""
import asyncio, base64, hashlib, hmac, json, os, statistics, struct, sys, time


class Line:
    async def connect(self, host, port):
        self.reader, self.writer = await asyncio.open_connection(host, port)
        self.buffer = b""

    async def until(self, token):
        while token not in self.buffer:
            data = await self.reader.read(65536)
            if not data:
                raise EOFError(self.buffer)
            self.buffer += data
        end = self.buffer.index(token) + len(token)
        found, self.buffer = self.buffer[:end], self.buffer[end:]
        return found


class Xmpp(Line):
    async def open(self, number, _):
        self.name = f"u{number}"
        await self.connect("127.0.0.1", int(sys.argv[2]))
        stream = b"<stream:stream to='localhost' xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>"
        self.writer.write(stream)
        await self.until(b"</stream:features>")
        plain = base64.b64encode(f"\0{self.name}\0pw".encode()).decode()
        self.writer.write(f"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='PLAIN'>{plain}</auth>".encode())
        await self.until(b"<success")
        self.writer.write(stream)
        await self.until(b"</stream:features>")
        self.writer.write(b"<iq type='set' id='b'><bind xmlns='urn:ietf:params:xml:ns:xmpp-bind'><resource>r</resource></bind></iq>")
        await self.until(b"</iq>")
        self.writer.write(b"<presence/>")
        await self.until(b"<presence")
        return self

    def send(self, to, text, key):
        self.writer.write(f"<message to='{to.name}@localhost' type='chat' id='{key}'><body>{text}</body></message>".encode())

    async def received(self):
        await self.until(b"</message>")


class Chat(Line):
    async def open(self, number, receives):
        urls = [url.removeprefix("http://") for url in sys.argv[2].split(",")]
        where, self.user = urls[-1 if receives else 0], number + 1
        encode = lambda data: base64.urlsafe_b64encode(data).rstrip(b"=").decode()
        body = json.dumps({"sub": str(self.user), "exp": int(time.time()) + 3600}).encode()
        signed = encode(b'{"alg":"HS256","typ":"JWT"}') + "." + encode(body)
        token = signed + "." + encode(hmac.new(sys.argv[3].encode(), signed.encode(), hashlib.sha256).digest())
        host, port = where.split(":")
        await self.connect(host, int(port))
        nonce = base64.b64encode(os.urandom(16)).decode()
        self.writer.write(
            f"GET /v1/ws HTTP/1.1\r\nHost: {where}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {nonce}\r\nSec-WebSocket-Protocol: chat.v1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        await self.until(b'"welcome"')
        return self

    def send(self, to, text, key):
        body = json.dumps({"type": "send", "key": key, "to": to.user, "text": text}).encode()
        length = len(body)
        head = bytes([0x81, 0x80 | length]) if length < 126 else b"\x81\xfe" + struct.pack(">H", length)
        self.writer.write(head + b"\0\0\0\0" + body)

    async def received(self):
        await self.until(b'"message"')


async def loop(kind, first, pairs, messages):
    lines = [(await kind().open(first + 2 * n, False), await kind().open(first + 2 * n + 1, True)) for n in range(pairs)]
    took = []

    async def pair(sender, receiver, count, measured):
        for _ in range(count):
            sent = time.perf_counter()
            sender.send(receiver, "a message of a pair", os.urandom(8).hex())
            await receiver.received()
            if measured:
                took.append((time.perf_counter() - sent) * 1e3)

    await asyncio.gather(*[pair(*line, 5, False) for line in lines])
    begun = time.perf_counter()
    await asyncio.gather(*[pair(*line, messages, True) for line in lines])
    rate = len(took) / (time.perf_counter() - begun)
    took.sort()
    print(f"{sys.argv[1]:5} {pairs:3} pairs: {rate:6.0f} messages/s, p50 {statistics.median(took):6.2f} ms, p99 {took[len(took) * 99 // 100]:6.2f} ms", flush=True)
    for line in lines:
        for end in line:
            end.writer.close()


async def main():
    kind = {"xmpp": Xmpp, "chat": Chat}[sys.argv[1]]
    for first, pairs, messages in [(0, 1, 500), (10, 16, 300), (60, 64, 150)]:
        await loop(kind, first, pairs, messages)


asyncio.run(main())
