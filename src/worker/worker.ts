/**
 * Entry of the module worker: hands requests to a session and its answers back. Pages speak to it through
 * `KraitWorker`.
 */
import { failureOf } from "./failure.ts";
import type { WorkerEvent, WorkerMessage, WorkerRequest } from "./protocol.ts";
import { Session } from "./session.ts";

const post = (message: WorkerMessage, transfer: Transferable[] = []) => {
  self.postMessage(message, { transfer });
};
const session = new Session((error) => post({ kind: "lost", error }));

/** Runs one request that wants an answer, and posts it. */
async function answer(request: Extract<WorkerRequest, { readonly id: number }>): Promise<void> {
  const { id } = request;
  const emit = (event: WorkerEvent) => post({ kind: "event", id, event });
  try {
    switch (request.kind) {
      case "open":
        return post({ kind: "done", id, value: await session.open() });
      case "train":
        return post({ kind: "done", id, value: await session.train(request.options, emit) });
      case "generate":
        return post({ kind: "done", id, value: await session.generate(request.options, emit) });
      case "checkpoint": {
        const value = await session.checkpoint();
        return post({ kind: "done", id, value }, [value.weights.buffer]);
      }
    }
  } catch (error) {
    post({ kind: "failed", id, error: failureOf(error) });
  }
}

self.addEventListener("message", ({ data: request }: MessageEvent<WorkerRequest>) => {
  switch (request.kind) {
    case "pause": return session.pause();
    case "resume": return session.resume();
    case "stop": return session.stop(request.task);
    case "open": case "train": case "generate": case "checkpoint":
      void answer(request);
  }
});
