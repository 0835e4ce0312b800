# syntax=docker/dockerfile:1
# The operator's image, for linux/amd64 and linux/arm64:
#   docker build --tag cyberdesk-operator:0.1.0 .
# What reaches the build is listed in .dockerignore; what of this holds without a container engine, .ci/image tries.

# It compiles on the builder's architecture for the wanted one: an emulated compiler takes many times as long.
FROM --platform=$BUILDPLATFORM rust:1.95.0-slim-bookworm AS build
ARG TARGETARCH
RUN case "$TARGETARCH" in \
        amd64) echo x86_64 ;; \
        arm64) echo aarch64 ;; \
        *) echo "no image is made for $TARGETARCH" >&2; exit 1 ;; \
    esac > /machine \
    && apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && machine=$(cat /machine) \
    && if [ "$machine" != "$(uname --machine)" ]; then \
        apt-get install --yes --no-install-recommends \
            "gcc-$(echo "$machine" | tr _ -)-linux-gnu" "libc6-dev-$TARGETARCH-cross" \
        && rustup target add "$machine-unknown-linux-gnu"; \
    fi \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/source/target,id=target-$TARGETARCH \
    machine=$(cat /machine) \
    && export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER=x86_64-linux-gnu-gcc \
              CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
              "CC_${machine}_unknown_linux_gnu=$machine-linux-gnu-gcc" \
    && cargo build --locked --release --bin cyberdesk-operator --target "$machine-unknown-linux-gnu" \
    && install -D "target/$machine-unknown-linux-gnu/release/cyberdesk-operator" /out/cyberdesk-operator

# The C library, the authorities that are trusted, and no shell.
FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="cyberdesk-operator" \
      org.opencontainers.image.description="Keeps a fleet of KubeVirt desktops true to a Postgres table" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /out/cyberdesk-operator /usr/bin/cyberdesk-operator
# By number, so that Kubernetes sees that it is not root.
USER 65532:65532
EXPOSE 8080
ENTRYPOINT ["/usr/bin/cyberdesk-operator"]
CMD ["run"]
