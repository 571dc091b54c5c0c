# The server, built from a clean clone and run without root:
#
#   docker build --tag bcg .
#   docker run --gpus all --publish 30000:30000 --volume /models/qwen3-8b:/model:ro bcg \
#       --model /model --host 0.0.0.0 --enable-breakable-cuda-graph
#
# docs/DEPLOYMENT.md tells more.

FROM rust:1.95.0-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked --package bcg-cli --bins

# Holds what the server looks for when it first needs it: libnvrtc.so.13 and libcublasLt.so.13. The driver's libcuda.so.1
# comes from the machine, through NVIDIA's container toolkit; without it the server runs on the host device.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04
RUN useradd --uid 10001 --create-home --home-dir /var/lib/bcg bcg \
    && install --directory --owner bcg --group bcg --mode 0700 /var/cache/bcg
COPY --from=build /src/target/release/bcg-server /src/target/release/bcg /usr/local/bin/
# Compiled kernels; a volume here keeps them between containers.
ENV BCG_CACHE_DIR=/var/cache/bcg
USER 10001:10001
WORKDIR /var/lib/bcg
EXPOSE 30000
# Plain HTTP on the default port; for others say --no-healthcheck, or a command of your own. Loading a model may take long.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/30000 && printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && head -n 1 <&3 | grep -q ' 200 '"]
ENTRYPOINT ["bcg-server"]
CMD ["--help"]
