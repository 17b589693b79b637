/** What a scope frees at its end. */
interface Scoped {
  release(): void;
}

interface Scope {
  readonly tensors: Set<Scoped>;
  readonly outer: Scope | null;
}

let current: Scope | null = null;
/** The innermost `unscoped` call that runs. */
let making: Scope | null = null;

/** Puts a new tensor into the innermost scope; outside of every scope its maker owns it. */
export function register(tensor: Scoped): void {
  current?.tensors.add(tensor);
}

/**
 * Runs `body` and then frees every tensor made inside it, except those it returns (found in arrays, maps and
 * plain objects), which pass to the scope around it. Synchronous: nothing in `body` may await.
 */
export function scope<T>(body: () => T): T {
  const mine: Scope = { tensors: new Set(), outer: current };
  current = mine;
  try {
    const result = body();
    promote(result);
    return result;
  } finally {
    current = mine.outer;
    for (const tensor of mine.tensors) tensor.release();
  }
}

/** Hands the tensors that a value holds to the scope around the running one, so that they outlive it. */
export function promote<T>(value: T): T {
  const running = current;
  if (running) {
    forEachScoped(value, running.tensors, (tensor) => {
      running.tensors.delete(tensor);
      running.outer?.tensors.add(tensor);
    });
  }
  return value;
}

/**
 * Runs `body` outside of every scope: what it makes belongs to whoever holds it. When `body` throws, what it
 * had made by then (in further `unscoped` calls too) is freed, since nobody holds it.
 */
export function unscoped<T>(body: () => T): T {
  const [outer, around] = [current, making];
  const mine: Scope = { tensors: new Set(), outer: null };
  current = making = mine;
  try {
    const result = body();
    if (around) for (const tensor of mine.tensors) around.tensors.add(tensor);
    return result;
  } catch (error) {
    for (const tensor of mine.tensors) tensor.release();
    throw error;
  } finally {
    current = outer;
    making = around;
  }
}

function forEachScoped(value: unknown, set: ReadonlySet<Scoped>, visit: (tensor: Scoped) => void): void {
  if (typeof value !== "object" || value === null) return;
  if (set.has(value as Scoped)) return visit(value as Scoped);
  if (Array.isArray(value)) for (const item of value) forEachScoped(item, set, visit);
  else if (value instanceof Map) for (const item of value.values()) forEachScoped(item, set, visit);
  else if (Object.getPrototypeOf(value) === Object.prototype) {
    for (const item of Object.values(value)) forEachScoped(item, set, visit);
  }
}
