"""Kinds of attention by name: the registry, what it holds by default, choice by cost."""
