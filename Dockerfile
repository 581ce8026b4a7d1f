# The server and the command-line client in one small image.

FROM rust:1-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY chat chat
COPY chat-client chat-client
COPY testkit testkit
COPY bench bench
COPY migrations migrations
# rust-toolchain.toml stays outside: the image brings its own toolchain.
RUN cargo build --release --locked -p chat -p chat-client

FROM debian:bookworm-slim
RUN useradd --system --no-create-home chat
COPY --from=build /src/target/release/chat /src/target/release/chat-client /usr/local/bin/
USER chat
EXPOSE 8080 8081
ENTRYPOINT ["chat"]
CMD ["serve"]
