// What is kept for this tab, until it is closed. Where the browser keeps nothing for a site (its
// cookies are blocked), it lasts as long as the page.

const page = new Map();

export const ofThisTab = {
  get(key) {
    try {
      return sessionStorage.getItem(key);
    } catch {
      return page.get(key) ?? null;
    }
  },

  /** Keep a text, or null for none; false: only until the page is loaded again. */
  set(key, value) {
    try {
      if (value === null) sessionStorage.removeItem(key);
      else sessionStorage.setItem(key, value);
      return true;
    } catch {
      page.set(key, value);
      return false;
    }
  },
};
