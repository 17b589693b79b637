/** The tuner's measurements in a page or worker: a table of IndexedDB. */
import type { TunerStore } from "./tuner_store.ts";

export type { TunerStore } from "./tuner_store.ts";

const DATABASE = "krait";
const TABLE = "tuning";

function open(): Promise<IDBDatabase> {
  const request = indexedDB.open(DATABASE, 1);
  request.addEventListener("upgradeneeded", () => request.result.createObjectStore(TABLE));
  return settled(request);
}

function settled<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", () => reject(request.error ?? new Error("IndexedDB failed.")));
  });
}

async function within<T>(mode: IDBTransactionMode, work: (table: IDBObjectStore) =>
  IDBRequest<T>): Promise<T> {
  const database = await open();
  try {
    return await settled(work(database.transaction(TABLE, mode).objectStore(TABLE)));
  } finally {
    database.close();
  }
}

export const tunerStore: TunerStore = {
  place: (name) => `IndexedDB ${DATABASE}/${TABLE}/${name}`,
  read: async (name) => {
    const text: unknown = await within("readonly", (table) => table.get(name));
    return typeof text === "string" ? text : null;
  },
  write: async (name, text) => void await within("readwrite", (table) => table.put(text, name)),
  remove: async (name) => within("readwrite", (table) => table.delete(name)),
};
