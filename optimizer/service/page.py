"""The page: replaced when the interface is written."""

from fastapi import FastAPI


def add_page(app: FastAPI) -> None:
    del app
