// A thread that looks like a web worker to the code of wllama: it gets the code and the bytes of its module.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { runInThisContext } from "node:vm";
import { parentPort, workerData } from "node:worker_threads";

const { create, globals } = createRequire(import.meta.url)("webgpu");
const define = (name, value) =>
  Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });

for (const [name, value] of Object.entries(globals)) define(name, value);
define("self", globalThis);
define("location", new URL("http://localhost/"));
define("WorkerGlobalScope", Object);
define("navigator", { gpu: create([]), hardwareConcurrency: 1, userAgent: "Node" });
define("fetch", async () => new Response(
  readFileSync(workerData.wasm), { headers: { "content-type": "application/wasm" } }));
define("postMessage", (data, transfer) => parentPort.postMessage(data, transfer?.transfer ?? transfer));
const quit = process.exit;
parentPort.on("message", (data) => globalThis.onmessage?.({ data }));
parentPort.on("close", () => quit());
define("process", undefined); // by which the code would know Node
runInThisContext(workerData.code);
