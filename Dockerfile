# Runs the quick start:
#   docker build --tag tdcompile .
#   docker run --rm tdcompile
# Keep the result:
#   mkdir -p out && docker run --rm --user "$(id -u)" --volume "$PWD/out:/work/out" tdcompile
# A smaller image takes torch for CPUs from another index: --build-arg PIP_OPTIONS="--extra-index-url URL"
FROM python:3.12-slim

ARG PIP_OPTIONS=""
COPY . /source
# torch first and by itself, as in the Makefile: constraints.txt may name a build of it ("+cpu") that an index lacks.
RUN torch="$(sed -n 's/^torch==//p' /source/constraints.txt | cut -d+ -f1)" \
 && python -m pip install --no-cache-dir --root-user-action ignore ${PIP_OPTIONS} -c /source/constraints.txt "torch==${torch}" \
 && python -m pip install --no-cache-dir --root-user-action ignore ${PIP_OPTIONS} -c /source/constraints.txt "/source[data]" \
 && rm -rf /source

# Any user may write here, so that --user works, also one without a name; measured prices go to /tmp.
RUN mkdir --mode 1777 /work
ENV TDCOMPILE_CACHE=/tmp/tdcompile \
    HOME=/tmp \
    LOGNAME=tdcompile
WORKDIR /work
USER nobody

ENTRYPOINT ["tdcompile"]
CMD ["demo", "--out", "out/quickstart"]
