# The server and the command-line client in one small image. Dependencies are a layer of their own: an edit of the code builds
# the code only.

FROM rust:1-bookworm AS dependencies
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY chat/Cargo.toml chat/
COPY chat/wire/Cargo.toml chat/wire/
COPY chat-client/Cargo.toml chat-client/
COPY testkit/Cargo.toml testkit/
COPY bench/Cargo.toml bench/
# rust-toolchain.toml stays outside: the image brings its own toolchain. The programs and libraries are empty here.
RUN for package in chat chat-client bench; do mkdir -p $package/src && echo 'fn main() {}' >$package/src/main.rs; done \
 && for package in chat chat/wire chat-client testkit; do mkdir -p $package/src && touch $package/src/lib.rs; done \
 && mkdir -p chat-client/tests && touch chat-client/tests/command.rs \
 && cargo build --release --locked -p chat -p chat-client

FROM dependencies AS build
COPY . .
# Newer than the empty ones.
RUN find chat chat-client -name '*.rs' -exec touch {} + \
 && rm -f rust-toolchain.toml \
 && cargo build --release --locked -p chat -p chat-client \
 && mkdir /out /symbols \
 && for program in chat chat-client; do \
      objcopy --only-keep-debug target/release/$program /symbols/$program.debug \
      && objcopy --strip-debug --add-gnu-debuglink=/symbols/$program.debug target/release/$program /out/$program; \
    done

# The symbols for a debugger or a profiler:  docker build --target symbols --output symbols .
FROM scratch AS symbols
COPY --from=build /symbols /

FROM debian:bookworm-slim
RUN useradd --system --no-create-home chat
COPY --from=build /out/chat /out/chat-client /usr/local/bin/
USER chat
EXPOSE 8080 8081
ENTRYPOINT ["chat"]
CMD ["serve"]
