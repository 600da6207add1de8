// Runs before the page is drawn, so that a dark page never flashes light.

(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return localStorage.getItem("bespoke.theme");
    } catch {
      return null;
    }
  };
  const follow = () => {
    const theme = chosen();
    const isDark = theme === "dark" || (theme !== "light" && system.matches);
    root.dataset.theme = isDark ? "dark" : "light";
  };
  follow();
  system.addEventListener("change", follow);
})();
